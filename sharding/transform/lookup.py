"""Look-ups in large tables that are stored cut by columns, and stay where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..plans.specs import axes_in, by_dimension, cut_into
from .gather import ByHand, StoredParameter
from .meshes import by_device, constraint


def lookup_by_columns(
    eqn: core.JaxprEqn,
    mesh: Mesh | AbstractMesh,
    table: StoredParameter,
    *,
    used: PartitionSpec,
    of_ids: PartitionSpec,
    by_hand: ByHand,
    wide: bool = False,
) -> Callable[[Any], Any] | None:
    """Return what reads rows of a table that is stored over more axes along its columns than it is `used`.

    The ids go to all devices that hold a part of the columns, each looks up its own, and an exchange gives
    each device whole rows of its own ids, as `of_ids` cuts them; its gradient goes back the same way. So
    nothing of the table's own size is sent or held. Gradients are summed in float32 if `wide`. None where the
    axes are not such.
    """
    value = table.value
    stored, whole = by_dimension(table.spec, value.ndim), by_dimension(tuple(used), value.ndim)
    cut = [n for n in range(value.ndim) if stored[n] != whole[n]]
    if len(cut) != 1 or stored[0] or whole[0]:
        return None
    column = cut[0]
    axes = stored[column][len(whole[column]) :]
    own_rows = {*axes_in(tuple(of_ids)), *by_hand.axes}
    # Each of the axes' devices has ids of its own, whose gradients are its own too.
    nests = stored[column] == whole[column] + axes and set(axes) <= own_rows
    apart = own_rows.isdisjoint(axes_in(tuple(used)))
    at_once = set(axes) <= set(by_hand.axes) or set(axes).isdisjoint(by_hand.axes)
    return (
        _ByColumns(eqn, mesh, table, used, of_ids, by_hand, axes, wide).read
        if nests and apart and at_once
        else None
    )


class _ByColumns:
    """See `lookup_by_columns`; the columns are stored over `axes` more than they are used."""

    def __init__(
        self,
        eqn: core.JaxprEqn,
        mesh: Mesh | AbstractMesh,
        table: StoredParameter,
        used: PartitionSpec,
        of_ids: PartitionSpec,
        by_hand: ByHand,
        axes: tuple[str, ...],
        wide: bool,
    ) -> None:
        aval: Any = eqn.invars[1].aval
        rank, value = aval.ndim - 1, table.value
        self._eqn, self._mesh, self._value, self._axes, self._wide = eqn, mesh, value, axes, wide
        # Of the rows that are read, with a dimension of the devices in front.
        self._column = (
            1
            + rank
            + next(
                n
                for n, entry in enumerate(by_dimension(table.spec, value.ndim)[1:])
                if set(axes) <= set(entry)
            )
        )
        ids = by_dimension(tuple(of_ids), rank)[:rank]
        rows = (*ids, *by_dimension(tuple(used), value.ndim)[1:])
        self._of_ids = PartitionSpec(*[entry or None for entry in ids], None)
        self._of_rows = PartitionSpec(*[entry or None for entry in rows])
        self._of_table = by_hand.rest(table.spec)
        self._reduced = NamedSharding(mesh, by_hand.rest(table.reduced))
        # Over what is done by hand, shares of gradients are summed outside.
        self._others = tuple(axis for axis in axes_in(ids) if axis not in axes)

    def read(self, ids: Any) -> Any:
        """Return the rows that `ids` name."""

        @jax.custom_vjp
        def rows(table: Any, ids: Any) -> Any:
            return self._by_device(self._read, (self._of_table, self._of_ids), self._of_rows)(table, ids)

        def backward(ids: Any, gradient: Any) -> tuple[Any, Any]:
            learnt = self._by_device(self._learn, (self._of_ids, self._of_rows), self._of_table)(
                ids, gradient
            )
            learnt = constraint(self._reduced.mesh)(learnt, self._reduced)
            return learnt, np.zeros(ids.shape, jax.dtypes.float0)

        rows.defvjp(lambda table, ids: (rows(table, ids), ids), backward)
        return rows(self._value, ids)

    def _by_device(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        return by_device(function, self._mesh, in_specs, out_specs)

    def _looked_up(self, table: Any, ids: Any) -> Any:
        """Return a device's columns of the rows that the ids of all devices name."""
        p = self._eqn.params
        numbers = p["dimension_numbers"]
        return jax.lax.gather(
            table,
            jax.lax.all_gather(ids, self._axes),
            numbers._replace(offset_dims=tuple(d + 1 for d in numbers.offset_dims)),
            (1, *table.shape[1:]),
            mode=p["mode"],
            fill_value=p["fill_value"],
        )

    def _read(self, table: Any, ids: Any) -> Any:
        found = self._looked_up(table, ids)
        return jax.lax.all_to_all(found, self._axes, 0, self._column, tiled=True)[0]

    def _learn(self, ids: Any, gradient: Any) -> Any:
        sent = jax.lax.all_to_all(gradient[None], self._axes, self._column, 0, tiled=True)
        cut = by_dimension(tuple(self._of_table), self._value.ndim)
        own = [
            size // cut_into(axes, self._mesh.shape)
            for size, axes in zip(self._value.shape, cut, strict=True)
        ]
        dtype = jnp.promote_types(gradient.dtype, jnp.float32) if self._wide else gradient.dtype
        like = jax.ShapeDtypeStruct(tuple(own), dtype)
        (sums,) = jax.linear_transpose(lambda table: self._looked_up(table, ids), like)(sent.astype(dtype))
        sums = sums.astype(gradient.dtype)
        return jax.lax.psum(sums, self._others) if self._others else sums
