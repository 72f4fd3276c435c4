"""Looking up and writing at computed places: in what all share, or each example in its own rows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from ..graph import PartGraph, known_now, one_of
from ..values import SUM, Held, Kind, NotInParts, examples


def gather(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a look-up."""
    table, at = ins
    dims, sizes = eqn.params["dimension_numbers"], list(eqn.params["slice_sizes"])
    aval: Any = eqn.outvars[0].aval
    free = [d for d in range(aval.ndim) if d not in dims.offset_dims]
    kept = _others(table, dims.collapsed_slice_dims, dims.operand_batching_dims)
    if table.kind is Kind.EXAMPLES:
        d, pre = table.form.axis, table.form.pre
        if d in dims.operand_batching_dims:
            axis = dims.start_indices_batching_dims[dims.operand_batching_dims.index(d)]
            return g.bind(eqn, [table, g.rows(at, axis, pre)], [examples(free[axis], pre)])
        if d in dims.start_index_map:
            place = dims.start_index_map.index(d)
            own = _own_rows(at, place, table.shape[d]) if d in dims.collapsed_slice_dims else None
            if own is None:
                raise NotInParts("examples are looked up at computed places")
            return g.bind(eqn, [table, _within(g, at, own, pre, place)], [examples(free[own], pre)])
        if d not in kept or sizes[d] != table.shape[d]:
            raise NotInParts("some of the examples are looked up")
        sizes[d] //= g.parts
        out = table.form.at(dims.offset_dims[kept.index(d)])
        return g.bind(eqn, [table, g.shared(at)], [out], slice_sizes=tuple(sizes))
    form = one_of([at]).form
    if form.axis == len(at.shape) - 1:
        raise NotInParts("an index is made of several examples")
    if form.axis in dims.start_indices_batching_dims:
        d = dims.operand_batching_dims[dims.start_indices_batching_dims.index(form.axis)]
        table = g.bring(table, form.at(d))
    return g.bind(eqn, [g.shared(table) if table.kind is Kind.SUM else table, at], [form.at(free[form.axis])])


def scatter(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read writing into an array; what examples add to one that all share is a sum."""
    table, at, new = ins
    dims = eqn.params["dimension_numbers"]
    free = [d for d in range(len(new.shape)) if d not in dims.update_window_dims]
    kept = _others(table, dims.inserted_window_dims, dims.operand_batching_dims)
    found = _written_along(table, at, new, dims, free)
    if found is not None:
        return _scattered(g, eqn, ins, found, free)
    # The examples lie along a window that is written whole.
    if table.kind is Kind.EXAMPLES:
        d, pre = table.form.axis, table.form.pre
    else:
        d, pre = kept[dims.update_window_dims.index(new.form.axis)], new.form.pre
    u = dims.update_window_dims[kept.index(d)]
    if d in dims.scatter_dims_to_operand_dims or new.shape[u] != table.shape[d]:
        raise NotInParts("some of the examples are written over")
    return g.bind(eqn, [g.rows(table, d, pre), g.shared(at), g.rows(new, u, pre)], [examples(d, pre)])


def _written_along(table: Held, at: Held, new: Held, dims: Any, free: list[int]) -> tuple[int, int] | None:
    """Return the dimension of the indices that the examples come along and their `pre`, if there is one."""
    if at.kind is Kind.EXAMPLES:
        return at.form.axis, at.form.pre
    if new.kind is Kind.EXAMPLES and new.form.axis in free:
        return free.index(new.form.axis), new.form.pre
    if table.kind is not Kind.EXAMPLES:
        return None
    d, pre = table.form.axis, table.form.pre
    if d in dims.operand_batching_dims:
        return dims.scatter_indices_batching_dims[dims.operand_batching_dims.index(d)], pre
    if d not in dims.inserted_window_dims:
        return None
    own = _own_rows(at, dims.scatter_dims_to_operand_dims.index(d), table.shape[d])
    if own is None:
        raise NotInParts("examples are written at computed places")
    return own, pre


def _scattered(
    g: PartGraph, eqn: core.JaxprEqn, ins: list[Held], found: tuple[int, int], free: list[int]
) -> list[Held]:
    table, at, new = ins
    (axis, pre), dims = found, eqn.params["dimension_numbers"]
    if axis == len(at.shape) - 1:
        raise NotInParts("an index is made of several examples")
    new = g.rows(new, free[axis], pre)
    if axis in dims.scatter_indices_batching_dims:
        d = dims.operand_batching_dims[dims.scatter_indices_batching_dims.index(axis)]
        return g.bind(eqn, [g.rows(table, d, pre), g.rows(at, axis, pre), new], [examples(d, pre)])
    for place, d in enumerate(dims.scatter_dims_to_operand_dims):
        if d in dims.inserted_window_dims and _own_rows(at, place, table.shape[d]) == axis:
            ready = [g.rows(table, d, pre), _within(g, at, axis, pre, place), new]
            return g.bind(eqn, ready, [examples(d, pre)])
    if eqn.primitive.name not in ("scatter-add", "scatter-sub") or table.kind is Kind.EXAMPLES:
        raise NotInParts("examples are written at computed places")
    return g.bind(eqn, [g.sum(table), g.rows(at, axis, pre), new], [SUM])


def _others(table: Held, *taken: Any) -> list[int]:
    return [d for d in range(len(table.shape)) if not any(d in dims for dims in taken)]


def _component(indices: Held, place: int) -> np.ndarray | None:
    """Return one component of an array of index vectors, if it is known now."""
    value = indices.whole or indices
    known = known_now(value)
    if known is not None:
        return known[..., place]
    eqn = value.op.eqn if value.op else None
    if value.op and eqn is not None and eqn.primitive.name == "concatenate":
        if eqn.params["dimension"] != len(value.shape) - 1:
            return None
        for one in value.op.ins:
            if place < one.shape[-1]:
                return _component(one, place)
            place -= one.shape[-1]
    return None


def _own_rows(indices: Held, place: int, rows: int) -> int | None:
    """Return the dimension along which component `place` counts all `rows`: each example looks up itself."""
    known = _component(indices, place)
    if known is None:
        return None
    for axis in range(len(indices.shape) - 1):
        if known.shape[axis] == rows:
            count = np.arange(rows).reshape([-1 if d == axis else 1 for d in range(known.ndim)])
            if (known == count).all():
                return axis
    return None


def _within(g: PartGraph, indices: Held, axis: int, pre: int, place: int) -> Held:
    """Return indices whose component `place` counts the rows of the part."""
    value = g.rows(indices, axis, pre)

    def run(_: object, array: jax.Array) -> list[jax.Array]:
        return [array.at[..., place].set(lax.broadcasted_iota(array.dtype, array.shape[:-1], axis))]

    return g.emit(run, [value], [Held(value.shape, value.dtype, examples(axis, pre))])[0]
