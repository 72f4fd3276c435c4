"""Tables cut by rows, looked up in: each device reads and learns its own rows, and no device all of them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

_Mode = jax.lax.GatherScatterMode
_Axes = tuple[str, ...]


def looks_up_rows(eqn: core.JaxprEqn) -> bool:
    """Whether an equation reads whole rows of a table of floats, ``table[ids]``, one for each id."""
    if eqn.primitive.name != "gather":
        return False
    avals: list[Any] = [atom.aval for atom in (*eqn.invars, eqn.outvars[0])]
    table, ids, out = avals
    numbers = eqn.params["dimension_numbers"]
    of_ids = len(ids.shape) - 1
    return (
        jnp.issubdtype(table.dtype, jnp.inexact)
        and eqn.params["mode"] in (_Mode.CLIP, _Mode.FILL_OR_DROP, _Mode.PROMISE_IN_BOUNDS)
        and tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])
        and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims) == tuple(range(of_ids, len(out.shape)))
    )


class Lookup:
    """``table[ids]`` as `eqn` reads it, with the table's rows over some axes of `mesh`.

    `of_table`, `of_ids` and `of_rows` say where the table, the ids and what is read lie while computing. Left
    to itself, XLA gathers the table where the rows read lie over the axes that cut it, and adds up its
    gradient whole on every device. Here each device finds the ids of its own rows, and what they read is
    summed over the others, each keeping its part where `of_rows` says so.
    """

    def __init__(
        self,
        eqn: core.JaxprEqn,
        mesh: Mesh | AbstractMesh,
        of_table: PartitionSpec,
        of_ids: PartitionSpec,
        of_rows: PartitionSpec,
    ) -> None:
        avals: list[Any] = [atom.aval for atom in eqn.invars]
        table, ids = avals
        self._mode, self._fill = eqn.params["mode"], eqn.params["fill_value"]
        self._mesh = mesh
        self._whole = table.shape[0]
        self._of_table = of_table
        self._axes = _axes(of_table[0])
        self._rows = table.shape[0] // math.prod(mesh.shape[axis] for axis in self._axes)
        rank = ids.ndim - 1
        # An axis of the table holds all ids, and each of its devices looks for its own among them.
        busy = {axis for entry in of_table for axis in _axes(entry)}
        entries = [_axes(entry) for entry in (*of_ids, *[None] * rank)][:rank]
        self._entries = [tuple(axis for axis in entry if axis not in busy) for entry in entries]
        wanted = [_axes(entry) for entry in (*of_rows, *[None] * rank)][:rank]
        # Where the sum over the table's axes is scattered: a dimension of the ids, cut by them innermost.
        self._scattered = next(
            (
                n
                for n, (entry, own) in enumerate(zip(wanted, self._entries, strict=True))
                if entry == own + self._axes
            ),
            None,
        )

    def read(self, table: Any, ids: Any) -> Any:
        """Return the rows that `ids` ``[…, 1]`` name of `table` ``[rows, …]``, with its gradient."""

        @jax.custom_vjp
        def rows(table: Any, ids: Any) -> Any:
            scattered = list(self._entries)
            if self._scattered is not None:
                scattered[self._scattered] += self._axes
            return jax.shard_map(
                self._read,
                mesh=self._mesh,
                in_specs=(self._of_table, self._spec_of_ids()),
                out_specs=self._spec(scattered),
                check_vma=False,
            )(table, ids)

        def backward(ids: Any, gradient: Any) -> tuple[Any, Any]:
            learnt = jax.shard_map(
                self._learn,
                mesh=self._mesh,
                in_specs=(self._spec_of_ids(), self._spec(self._entries)),
                out_specs=self._of_table,
                check_vma=False,
            )(ids, gradient)
            return learnt, np.zeros(ids.shape, jax.dtypes.float0)

        rows.defvjp(lambda table, ids: (rows(table, ids), ids), backward)
        return rows(table, ids)

    def _read(self, table: Any, ids: Any) -> Any:
        place, mine = self._own(ids)
        wide = (...,) + (None,) * (table.ndim - 1)
        found = table.at[jnp.where(mine, place, 0)].get(mode="promise_in_bounds")
        found = jnp.where(mine[wide], found, jnp.zeros((), table.dtype))
        if self._scattered is None:
            found = jax.lax.psum(found, self._axes)
        else:
            place = self._scattered
            found = jax.lax.psum_scatter(found, self._axes, scatter_dimension=place, tiled=True)
            own = found.shape[place]
            ids = jax.lax.dynamic_slice_in_dim(ids, jax.lax.axis_index(self._axes) * own, own, place)
        if self._mode != _Mode.FILL_OR_DROP:
            return found
        fill = jnp.nan if self._fill is None else self._fill
        inside = (ids[..., 0] >= 0) & (ids[..., 0] < self._whole)
        return jnp.where(inside[wide], found, jnp.asarray(fill, found.dtype))

    def _learn(self, ids: Any, gradient: Any) -> Any:
        place, mine = self._own(ids)
        sums = jnp.zeros((self._rows, *gradient.shape[ids.ndim - 1 :]), gradient.dtype)
        # What is another device's lies outside, and is dropped.
        sums = sums.at[jnp.where(mine, place, self._rows)].add(gradient, mode="drop")
        others = tuple(axis for entry in self._entries for axis in entry)
        return jax.lax.psum(sums, others) if others else sums

    def _own(self, ids: Any) -> tuple[Any, Any]:
        """Return where each id lies in this device's rows, and whether it does."""
        wanted = ids[..., 0]
        if self._mode == _Mode.CLIP:
            wanted = jnp.clip(wanted, 0, self._whole - 1)
        place = wanted - jax.lax.axis_index(self._axes).astype(wanted.dtype) * self._rows
        return place, (place >= 0) & (place < self._rows)

    def _spec_of_ids(self) -> PartitionSpec:
        return PartitionSpec(*[entry or None for entry in self._entries], None)

    def _spec(self, entries: list[_Axes]) -> PartitionSpec:
        return PartitionSpec(*[entry or None for entry in entries], *self._of_table[1:])


def _axes(entry: Any) -> _Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
