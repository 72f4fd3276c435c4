"""Look-ups in tables that stay where they are stored, and whose gradients devices sum by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..ops.arithmetic import row_sums
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


def lookup_summed_by_device(
    eqn: core.JaxprEqn,
    mesh: Mesh | AbstractMesh,
    table: StoredParameter,
    gather: Callable[[Any], Any],
    *,
    used: PartitionSpec,
    of_ids: PartitionSpec,
    widens: bool = False,
) -> Callable[[Any], Any] | None:
    """Return what reads rows of a table of 16 bits, whose gradient each device sums in float32.

    The table is read as `gather` brings it, `used` so, its rows whole. A device adds up what its own ids
    read, rounds the sums to the table's type, and scatters these over the devices: as many bytes as of the
    gradient that JAX sums in that type. Left to XLA, sums in float32 would travel, and be reduced whole. They
    travel in float32 at least if it `widens`. None where no axis but those of the table cuts `of_ids`.
    """
    value, rank = table.value, eqn.invars[1].aval.ndim - 1  # type: ignore[union-attr]
    whole = by_dimension(tuple(used), value.ndim)
    rows = axes_in(tuple(of_ids))
    if whole[0] or not rows or not set(rows).isdisjoint(axes_in(tuple(used))):
        return None
    goal = by_dimension(table.reduced, value.ndim)
    # Where the gradient is kept cut by more than the table is read by; the sums are scattered there.
    more = [
        tuple(axes[len(read) :]) if axes[: len(read)] == read and set(axes[len(read) :]) <= set(rows) else ()
        for read, axes in zip(whole, goal, strict=True)
    ]
    scattered = [axis for axes in more for axis in axes]
    ids = PartitionSpec(*[entry or None for entry in by_dimension(tuple(of_ids), rank)[:rank]], None)
    read_so = PartitionSpec(*tuple(ids)[:rank], *[axes or None for axes in whole[1:]])
    learnt_so = PartitionSpec(*[(a + b) or None for a, b in zip(whole, more, strict=True)])
    params = eqn.primitive.get_bind_params(eqn.params)

    def learn(ids: Any, gradient: Any) -> Any:
        cut = [size // cut_into(axes, mesh.shape) for size, axes in zip(value.shape, whole, strict=True)]
        sums = row_sums(eqn, tuple(cut), ids, gradient)
        sums = sums if widens else sums.astype(gradient.dtype)
        for place, axes in enumerate(more):
            if axes:
                sums = jax.lax.psum_scatter(sums, axes, scatter_dimension=place, tiled=True)
        others = tuple(axis for axis in rows if axis not in scattered)
        return (jax.lax.psum(sums, others) if others else sums).astype(gradient.dtype)

    @jax.custom_vjp
    def read(table: Any, ids: Any) -> Any:
        return eqn.primitive.bind(gather(table), ids, **params)

    def backward(kept: Any, gradient: Any) -> tuple[Any, Any]:
        learnt = by_device(learn, mesh, (ids, read_so), learnt_so)(kept, gradient)
        learnt = constraint(mesh)(learnt, NamedSharding(mesh, PartitionSpec(*table.reduced)))
        return learnt, np.zeros(kept.shape, jax.dtypes.float0)

    read.defvjp(lambda table, ids: (read(table, ids), ids), backward)
    return lambda ids: read(value, ids)
