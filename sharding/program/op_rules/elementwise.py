"""Operations that act on each position by itself: dimensions correspond position by position."""

from __future__ import annotations

import functools

from ..primitives import Trait, primitives
from .rule import Builder, Op, OpRule, Rule, Shape


def elementwise(op: Op) -> OpRule:
    """Unite dimensions position by position; scalars and dimensions of size 1 are broadcast."""
    return _rule(op.ins, op.outs)


def passing(op: Op) -> OpRule:
    """Unite each result with the operand at the same place; their shapes may differ from one to the next."""
    builder = Builder(op)
    for number, shape in enumerate(op.ins):
        outs = len(op.outs) > number and op.outs[number] == shape
        for dim, size in enumerate(shape):
            builder.factor("map", size, [(number, dim)], [(number, dim)] if outs else [])
    return builder.done()


def bitcast(op: Op) -> OpRule:
    """Unite the dimensions that both arrays have; a last one that holds an element's parts stays whole."""
    builder = Builder(op)
    for dim, size in enumerate(op.ins[0][: len(op.outs[0])]):
        if op.outs[0][dim] == size:
            builder.factor("map", size, [(0, dim)], [(0, dim)])
    return builder.done()


@functools.lru_cache(maxsize=4096)
def _rule(ins: tuple[Shape, ...], outs: tuple[Shape, ...]) -> OpRule:
    builder = Builder(Op("elementwise", ins, outs, {}))
    rank = max(len(shape) for shape in (*ins, *outs))
    for dim in range(rank):
        arrays = [shape[dim] for shape in (*ins, *outs) if len(shape) == rank]
        size = max(arrays)
        for places, shapes in ((builder.put_in, ins), (builder.put_out, outs)):
            for number, shape in enumerate(shapes):
                if len(shape) == rank and shape[dim] == 1:
                    places(number, dim)
        if size != 1:
            builder.factor(
                "map",
                size,
                [(n, dim) for n, s in enumerate(ins) if len(s) == rank and s[dim] == size],
                [(n, dim) for n, s in enumerate(outs) if len(s) == rank and s[dim] == size],
            )
    return builder.done()


RULES: dict[str, Rule] = {
    **dict.fromkeys(primitives(Trait.ELEMENTWISE), elementwise),
    **dict.fromkeys(primitives(Trait.PASSING), passing),
    "bitcast_convert_type": bitcast,
}
