"""Reductions, cumulative operations and sorting along a dimension."""

from __future__ import annotations

from .rule import Builder, Kind, Op, OpRule, Rule


def _reduction(kind: Kind) -> Rule:
    def rule(op: Op) -> OpRule:
        """Drop the reduced dimensions; the others keep their order."""
        axes = {int(a) for a in op.params.get("axes", op.params.get("dimensions", ()))}
        arrays = [n for n, shape in enumerate(op.ins) if len(shape) == len(op.ins[0])] if op.ins[0] else []
        results = range(len(op.outs))
        builder = Builder(op)
        out = 0
        for dim, size in enumerate(op.ins[0]):
            places = [(n, dim) for n in arrays]
            if dim in axes:
                builder.factor(kind, size, places)
            else:
                builder.factor("map", size, places, [(n, out) for n in results])
                out += 1
        return builder.done()

    return rule


def _along(*parameters: str) -> Rule:
    def rule(op: Op) -> OpRule:
        """Keep the dimension that is worked along whole; the others are independent rows."""
        axis = next(int(op.params[name]) for name in parameters if name in op.params) % len(op.ins[0])
        builder = Builder(op)
        for dim, size in enumerate(op.ins[0]):
            ins = [(n, dim) for n, shape in enumerate(op.ins) if shape == op.ins[0]]
            outs = [(n, dim) for n, shape in enumerate(op.outs) if shape[dim] == size]
            builder.factor("whole" if dim == axis else "map", size, ins, outs)
        return builder.done()

    return rule


def _top_k(op: Op) -> OpRule:
    """Keep the dimension that is chosen from whole; [.., n] becomes [.., k]."""
    shape = op.ins[0]
    axis = int(op.params.get("axis", op.params.get("reduction_dimension", -1))) % len(shape)
    builder = Builder(op)
    for dim, size in enumerate(shape):
        if dim != axis:
            builder.factor("map", size, [(0, dim)], [(n, dim) for n in range(len(op.outs))])
    builder.factor("whole", shape[axis], [(0, axis)])
    builder.factor("whole", op.outs[0][axis], (), [(n, axis) for n in range(len(op.outs))])
    return builder.done()


RULES: dict[str, Rule] = {
    "reduce_sum": _reduction("contract"),
    **{f"reduce_{name}": _reduction("reduce") for name in ("max", "min", "prod", "and", "or", "xor")},
    "reduce": _reduction("reduce"),
    "argmax": _reduction("reduce"),
    "argmin": _reduction("reduce"),
    # `vmap` makes sums over a dimension of these when its axis has a name.
    "psum": _reduction("contract"),
    "pmax": _reduction("reduce"),
    "pmin": _reduction("reduce"),
    **{f"cum{name}": _along("axis") for name in ("sum", "prod", "max", "min", "logsumexp")},
    "sort": _along("dimension"),
    "top_k": _top_k,
    "approx_top_k": _top_k,
}
