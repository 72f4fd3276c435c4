"""Convolutions and pooling: windows that slide over spatial dimensions."""

from __future__ import annotations

from typing import Any

from ..primitives import Trait, primitives
from .rule import Builder, Op, OpRule, Rule


def conv_general_dilated(op: Op) -> OpRule:
    """Slide a kernel: batch and result channels are independent, input channels are contracted.

    With feature groups the channels of the operand are (groups, channels), those of the kernel's results
    (groups, channels); with batch groups the batch is (groups, batch).
    """
    numbers: Any = op.params["dimension_numbers"]
    lhs, rhs = op.ins[:2]
    (lhs_batch, lhs_in, *lhs_space) = numbers.lhs_spec
    (rhs_out, rhs_in, *rhs_space) = numbers.rhs_spec
    (out_batch, out_feature, *out_space) = numbers.out_spec
    groups, batch_groups = op.params["feature_group_count"], op.params["batch_group_count"]
    builder = Builder(op)

    batch = builder.factor("map", op.outs[0][out_batch])
    channels = builder.factor("contract", rhs[rhs_in])
    features = builder.factor("map", rhs[rhs_out] // (groups * batch_groups))
    group = builder.factor("map", groups * batch_groups)
    by_batch = batch_groups > 1
    builder.put_in(0, lhs_batch, *((group, batch) if by_batch else (batch,)))
    builder.put_in(0, lhs_in, *((channels,) if by_batch else (group, channels)))
    builder.put_in(1, rhs_out, group, features)
    builder.put_in(1, rhs_in, channels)
    builder.put_out(0, out_batch, batch)
    builder.put_out(0, out_feature, group, features)
    for a, b, c in zip(lhs_space, rhs_space, out_space, strict=True):
        builder.factor("window", rhs[b], [(1, b)])
        builder.resized(0, a, 0, c, kind="map" if rhs[b] == 1 and lhs[a] == op.outs[0][c] else "resize")
    return builder.done()


def pooling(op: Op) -> OpRule:
    """Reduce a window at each place; dimensions whose window is 1 pass through."""
    rank = len(op.outs[0])
    arrays = [n for n, shape in enumerate(op.ins) if len(shape) == rank and rank]
    windows = op.params.get("window_dimensions", (0,) * rank)
    builder = Builder(op)
    for dim in range(rank):
        before = {op.ins[n][dim] for n in arrays}
        if before == {op.outs[0][dim]}:
            kind = "map" if windows[dim] == 1 else "resize"
            places = [(n, dim) for n in range(len(op.outs))]
            builder.factor(kind, op.outs[0][dim], [(n, dim) for n in arrays], places)
            continue
        out = builder.factor(
            "resize",
            op.outs[0][dim],
            [(n, dim) for n in arrays if op.ins[n][dim] == op.outs[0][dim]],
            [(n, dim) for n in range(len(op.outs))],
        )
        for size in sorted(before - {op.outs[0][dim]}):
            places = [(n, dim) for n in arrays if op.ins[n][dim] == size]
            builder.kin(builder.factor("resize", size, places), out)
    return builder.done()


RULES: dict[str, Rule] = {
    "conv_general_dilated": conv_general_dilated,
    **dict.fromkeys(primitives(Trait.POOLING), pooling),
}
