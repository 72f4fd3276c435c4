"""Factorisations, solves and Fourier transforms: leading dimensions are independent, the last are whole."""

from __future__ import annotations

from ..primitives import Trait, primitives
from .rule import Builder, Op, OpRule, Rule


def batched(op: Op) -> OpRule:
    """Unite the leading dimensions that all arrays share; matrices stay whole."""
    rank = min((len(shape) for shape in (*op.ins, *op.outs)), default=0)
    builder = Builder(op)
    for dim in range(min(max(len(op.ins[0]) - 2, 0), rank)):
        size = op.ins[0][dim]
        builder.factor(
            "map",
            size,
            [(n, dim) for n, shape in enumerate(op.ins) if shape[dim] == size],
            [(n, dim) for n, shape in enumerate(op.outs) if shape[dim] == size],
        )
    return builder.done()


def fft(op: Op) -> OpRule:
    """Transform the last dimensions, each whole; a real transform changes the size of the last."""
    lead = len(op.ins[0]) - len(op.params["fft_lengths"])
    builder = Builder(op)
    for dim, size in enumerate(op.ins[0]):
        if dim < lead:
            builder.factor("map", size, [(0, dim)], [(0, dim)])
        else:
            builder.resized(0, dim, 0, dim, kind="whole")
    return builder.done()


def triangular_solve(op: Op) -> OpRule:
    """Solve [.., n, n] for [.., n, m] (or [.., m, n]): right-hand sides are independent."""
    rank = len(op.ins[1])
    free = rank - 1 if op.params["left_side"] else rank - 2
    builder = Builder(op)
    for dim in range(rank - 2):
        builder.factor("map", op.ins[1][dim], [(0, dim), (1, dim)], [(0, dim)])
    for dim in (rank - 2, rank - 1):
        builder.factor("map" if dim == free else "whole", op.ins[1][dim], [(1, dim)], [(0, dim)])
    return builder.done()


RULES: dict[str, Rule] = {
    **dict.fromkeys(primitives(Trait.BATCHED), batched),
    "fft": fft,
    "triangular_solve": triangular_solve,
}
