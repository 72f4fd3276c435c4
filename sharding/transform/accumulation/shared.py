"""A part's slice of what all parts share: positions, constants, random draws keep their whole-batch meaning.

A slice is taken as near as it can be to where a value comes from, through elementwise operations and
broadcasts, so that nothing of the size of the whole batch is computed for a part.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry_prng_impl

from ...program.primitives import Trait, primitives
from .graph import PartGraph
from .values import Array, Held, Task, examples

# A key that serves several draws is split into as many as there are, and some keys are made together.
_ELEMENTWISE = primitives(Trait.ELEMENTWISE) - {"random_gamma", "random_fold_in"}


def take(whole: Array, axis: int, pre: int, parts: int, index: Any) -> Array:
    """Return part `index` of an array whose dimension `axis` is ``pre * parts * post``."""
    shape = whole.shape
    split = whole.reshape(*shape[:axis], pre, parts, shape[axis] // (pre * parts), *shape[axis + 1 :])
    part = lax.dynamic_index_in_dim(split, index, axis + 1, keepdims=False)
    return part.reshape(*shape[:axis], shape[axis] // parts, *shape[axis + 1 :])


def put_together(stacked: Array, axis: int, pre: int, shape: tuple[int, ...]) -> Array:
    """Return the whole array of `shape` whose parts `take` gives, from all parts on a leading dimension."""
    parts, local = stacked.shape[0], stacked.shape[1:]
    split = stacked.reshape(parts, *local[:axis], pre, local[axis] // pre, *local[axis + 1 :])
    return jnp.moveaxis(split, 0, axis + 1).reshape(shape)


def sliced(graph: PartGraph, whole: Held, axis: int, pre: int) -> Held:
    """Return a part's slice of a shared value."""
    result = _sunk(graph, whole, axis, pre)
    if result is None:
        out = Held(whole.shape, whole.dtype, examples(axis, pre))
        result = graph.emit(lambda index, x: [take(x, axis, pre, graph.parts, index)], [whole], [out])[0]
    result.whole = whole
    return result


def _sunk(graph: PartGraph, whole: Held, axis: int, pre: int) -> Held | None:
    op = whole.op
    if op is None or op.eqn is None:
        return None
    name = op.eqn.primitive.name
    if name in _ELEMENTWISE and len(op.outs) <= 2:
        ins = [
            one if one.shape == () or one.shape[axis] == 1 else graph.rows(one, axis, pre) for one in op.ins
        ]
        return graph.bind(op.eqn, ins, [examples(axis, pre)] * len(op.outs))[op.outs.index(whole)]
    if name == "broadcast_in_dim":
        return _broadcast(graph, op, whole, axis, pre)
    if name == "random_bits" and op.ins[0].shape == () and str(op.ins[0].dtype) == "key<fry>":
        return graph.rows(_opened(graph, op), axis, pre)
    if name == "iota":
        return _counted(graph, whole, axis, pre, op.eqn.params["dimension"])
    if name == "iota_2x32_shape" and math.prod(whole.shape) < 1 << 32:
        return _linear(graph, whole, axis, pre, high=op.outs.index(whole) == 0)
    return None


def _broadcast(graph: PartGraph, op: Task, whole: Held, axis: int, pre: int) -> Held:
    ins, dims = list(op.ins), tuple(op.eqn.params["broadcast_dimensions"])
    if axis in dims and ins[0].shape[dims.index(axis)] == whole.shape[axis]:
        ins[0] = graph.rows(ins[0], dims.index(axis), pre)
    shape = graph.small(whole.shape, axis)
    return graph.bind(op.eqn, ins, [examples(axis, pre)], shape=shape)[0]


def _opened(graph: PartGraph, op: Task) -> Held:
    """Return random bits as the hash of their numbers, of which a part needs its own."""
    params, key = op.eqn.params, op.ins[0]

    def draw(key: Array) -> Array:
        return threefry_prng_impl.random_bits(jax.random.key_data(key), params["bit_width"], params["shape"])

    return graph.read(jax.make_jaxpr(draw)(jax.ShapeDtypeStruct((), key.dtype)), [key])[0]


def _places(shape: tuple[int, ...], axis: int, pre: int, parts: int, index: Any, dtype: Any) -> Array:
    """Return where along `axis` of the whole array the entries of a part of `shape` stand."""
    post = shape[axis] // pre
    local = lax.broadcasted_iota(dtype, shape, axis)
    own = jnp.asarray(index, dtype)
    if post == 1:
        return local * parts + own
    return (local // post * parts + own) * post + local % post


def _counted(graph: PartGraph, whole: Held, axis: int, pre: int, dimension: int) -> Held:
    shape = graph.small(whole.shape, axis)

    def run(index: Any) -> list[Array]:
        if dimension != axis:
            return [lax.broadcasted_iota(whole.dtype, shape, dimension)]
        return [_places(shape, axis, pre, graph.parts, index, jnp.int32).astype(whole.dtype)]

    return graph.emit(run, [], [Held(whole.shape, whole.dtype, examples(axis, pre))])[0]


def _linear(graph: PartGraph, whole: Held, axis: int, pre: int, *, high: bool) -> Held:
    """Return the numbers of an array's elements, in two words of 32 bits of which one is 0."""
    shape = graph.small(whole.shape, axis)

    def run(index: Any) -> list[Array]:
        number = jnp.zeros(shape, jnp.uint32)
        if high:
            return [number]
        for d in range(len(shape)):
            stride = math.prod(whole.shape[d + 1 :])
            own = lax.broadcasted_iota(jnp.uint32, shape, d)
            places = _places(shape, axis, pre, graph.parts, index, jnp.uint32) if d == axis else own
            number = number + places * jnp.uint32(stride)
        return [number]

    return graph.emit(run, [], [Held(whole.shape, whole.dtype, examples(axis, pre))])[0]
