"""The sizes of groups that rows are sorted into: whether they count what the rows were sorted by."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..graph import PartGraph, known_now
from ..values import SUM, Held, Kind, is_alike

_SAME = (
    "reshape",
    "squeeze",
    "transpose",
    "copy",
    "stop_gradient",
    "convert_element_type",
    "broadcast_in_dim",
)
_PICKED = (*_SAME, "slice", "rev", "dynamic_slice")
# A float of 32 bits counts as far.
_MOST_IN_FLOATS = 1 << 24


def counts_of(g: PartGraph, sizes: Held, key: Held | None) -> Held | None:
    """Return a part's own `sizes` of groups, if the whole batch's say how often each number is in `key`."""
    casts, value = [], sizes
    while True:
        if value.kind is Kind.LATE:
            value = next((one for one, late in g.exports.items() if late is value), value)
            if value.kind is Kind.LATE and value.op is None:
                return None
        op = value.op
        if op is None or key is None or not _is_whole(key):
            return None
        if op.is_total:
            value = op.ins[0]
        elif _name(value) in ("convert_element_type", "copy", "stop_gradient") or _is_first(op.eqn):
            casts.append(op.eqn)
            value = op.ins[0]
        else:
            break
    counted = value.kind is Kind.SUM and value.combine == "sum"
    if not counted or not _counts(value, key) or not all(map(_holds, [value.dtype, *_types(casts)])):
        return None
    if math.prod(key.shape) >= _MOST_IN_FLOATS and any(
        _is_float(one) for one in [value.dtype, *_types(casts)]
    ):
        return None
    for eqn in reversed(casts):
        value = g.bind(eqn, [value], [SUM])[0]
    return value


def _is_first(eqn: Any) -> bool:
    """Whether an equation takes the first numbers of an array: what counts the others is left out."""
    params = {} if eqn is None or eqn.primitive.name != "slice" else eqn.params
    return params.get("start_indices") == (0,) and params["strides"] in (None, (1,))


def _types(casts: list[Any]) -> list[Any]:
    return [eqn.outvars[0].aval.dtype for eqn in casts]


def _is_float(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _holds(dtype: Any) -> bool:
    """Whether a type holds counts as they are."""
    return (_is_float(dtype) or bool(jnp.issubdtype(dtype, jnp.integer))) and jnp.dtype(dtype).itemsize >= 4


def _counts(value: Held, key: Held) -> bool:
    """Whether a sum over the examples counts how often each number is in `key`."""
    assert value.op is not None
    name, ins = _name(value), value.op.ins
    if name == "scatter-add":
        return _adds_ones(value, key)
    if name != "reduce_sum" or tuple(value.op.eqn.params["axes"]) != tuple(range(len(ins[0].shape) - 1)):
        return False
    # What is 1 where a number is that of its column.
    hot = ins[0]
    while _name(hot) in ("convert_element_type", "copy", "stop_gradient") and hot.op is not None:
        hot = hot.op.ins[0]
    if _name(hot) != "eq" or hot.op is None:
        return False
    for own, columns in (hot.op.ins, hot.op.ins[::-1]):
        source = _repeated(own)
        if (
            source is not None
            and _origin(source) is _origin(key)
            and _is_not_negative(key)
            and _count_up(columns)
        ):
            return True
    return False


def _adds_ones(value: Held, key: Held) -> bool:
    assert value.op is not None
    table, at, new = value.op.ins
    dims = value.op.eqn.params["dimension_numbers"]
    whole = table.op.ins[0] if table.op is not None and table.op.eqn is None and table.op.ins else None
    plain = len(value.shape) == 1 and not dims.update_window_dims and at.shape[-1] == 1
    if whole is None or not plain or _same(whole) != 0 or _same(new.whole or new) != 1:
        return False
    return _origin(at) is _origin(key) and _is_not_negative(key)


def _name(value: Held) -> str:
    op = value.op
    return "" if op is None or op.eqn is None else op.eqn.primitive.name


def _same(value: Held) -> Any:
    """Return the one number that all of an array is, None if that is not known."""
    if all(is_alike(value, axis) for axis in range(len(value.shape))):
        while value.shape and _name(value) in ("broadcast_in_dim", "convert_element_type", "copy"):
            assert value.op is not None
            value = value.op.ins[0]
    found = known_now(value)
    return found.flat[0] if found is not None and found.size and (found == found.flat[0]).all() else None


def _repeated(value: Held) -> Held | None:
    """Return what an array is along all dimensions but the last, along which it is alike."""
    while value.op is not None:
        if _name(value) == "broadcast_in_dim":
            inner, dims = value.op.ins[0], value.op.eqn.params["broadcast_dimensions"]
            if math.prod(inner.shape) == math.prod(value.shape[:-1]):
                last = len(value.shape) - 1
                ends = last not in dims or inner.shape[dims.index(last)] == 1
                return inner if ends else None
            return None
        if _name(value) not in ("convert_element_type", "copy") or not _keeps(value.op.ins[0], value):
            return None
        value = value.op.ins[0]
    return None


def _count_up(value: Held) -> bool:
    """Whether an array counts along its last dimension, and is alike along the others."""
    whole = value.whole or value
    if whole.kind is not Kind.SHARED:
        return False
    size = whole.shape[-1]
    while math.prod(whole.shape) > size and _name(whole) == "broadcast_in_dim" and whole.op is not None:
        inner, dims = whole.op.ins[0], whole.op.eqn.params["broadcast_dimensions"]
        last = len(whole.shape) - 1
        if (
            last not in dims
            or inner.shape[dims.index(last)] != size
            or dims.index(last) != len(inner.shape) - 1
        ):
            return False
        whole = inner
    found = known_now(whole) if math.prod(whole.shape) == size else None
    return found is not None and bool((found.reshape(-1) == np.arange(size)).all())


def _origin(value: Held) -> Held:
    """Return the array that holds the same numbers, as often, before it was viewed, moved or cast.

    What takes care of numbers below 0 leaves others as they are.
    """
    while value.op is not None and value.op.eqn is not None:
        op, name = value.op, _name(value)
        if name in _SAME:
            inner = op.ins[0]
            if math.prod(inner.shape) != math.prod(value.shape) or not _keeps(inner, value):
                return value
            value = inner
        elif name == "sort":
            value = op.ins[op.outs.index(value)]
        else:
            inner = {"max": _beside_a_number, "select_n": _wrapped}.get(name, _none)(op.ins)
            if inner is None:
                return value
            value = inner
    return value


def _none(ins: list[Held]) -> None:
    del ins


def _is_whole(value: Held) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.integer))


def _keeps(inner: Held, value: Held) -> bool:
    """Whether all numbers of one array are the same in the type of another."""
    if not (_is_whole(inner) and _is_whole(value)) or inner.dtype == value.dtype:
        return inner.dtype == value.dtype
    signs = jnp.issubdtype(inner.dtype, jnp.signedinteger), jnp.issubdtype(value.dtype, jnp.signedinteger)
    wider = jnp.dtype(value.dtype).itemsize - jnp.dtype(inner.dtype).itemsize
    return signs[1] and (wider > 0 or (wider == 0 and bool(signs[0])))


def _beside_a_number(ins: list[Held]) -> Held | None:
    """Return what a maximum with a number leaves as it is."""
    for one, other in (ins, ins[::-1]):
        number = known_now(other) if other.kind is Kind.SHARED and other.shape == () else None
        if number is not None and number <= 0 and _is_not_negative(one):
            return one
    return None


def _wrapped(ins: list[Held]) -> Held | None:
    """Return what a choice between a number and, where it is below 0, another leaves as it is."""
    if len(ins) != 3 or _name(ins[0]) != "lt" or ins[0].op is None:
        return None
    left, right = ins[0].op.ins
    number = known_now(right) if right.kind is Kind.SHARED and right.shape == () else None
    same = left is ins[1] and number is not None and number <= 0
    return ins[1] if same and _is_not_negative(ins[1]) else None


def _is_not_negative(value: Held) -> bool:
    """Whether no number of an array is below 0, by what gave it."""
    while True:
        if jnp.issubdtype(value.dtype, jnp.unsignedinteger):
            return True
        whole = value.whole if value.kind is Kind.EXAMPLES else value
        found = None if whole is None or whole.kind is not Kind.SHARED else known_now(whole)
        if found is not None:
            return bool((found >= 0).all())
        op, name = value.op, _name(value)
        if op is None:
            return False
        if name in ("argmax", "argmin", "iota") or (name == "top_k" and op.outs.index(value) == 1):
            return True
        if name == "max":
            return any(_is_not_negative(one) for one in op.ins)
        if name == "select_n":
            inner = _wrapped(op.ins)
            if inner is None:
                return all(_is_not_negative(one) for one in op.ins[1:])
            value = inner
        elif name == "sort":
            value = op.ins[op.outs.index(value)]
        elif name in _PICKED and _keeps(op.ins[0], value):
            value = op.ins[0]
        else:
            return False
