"""Operations that act on each position by itself: dimensions correspond position by position."""

from __future__ import annotations

import functools

from .rule import Builder, Op, OpRule, Rule, Shape, words

_NAMES = words(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz
    complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log
    log1p log2 logistic lt lt_to max min mul mulhi name ne neg nextafter not one_minus_square or
    polygamma polynomial population_count pow real reduce_precision regularized_incomplete_beta rem
    round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh threefry2x32 threefry4x32 philox2x32 philox4x32 xor zeta
    sharding_constraint layout_constraint reshard mesh_cast with_memory_space_constraint pvary pcast pin
    unpin relayout optimization_barrier device_put tie custom_lin dce_sink
    """
)

# These take and give several arrays of different shapes: the n-th result is the n-th operand.
_PASSING = {"optimization_barrier", "device_put", "copy", "copy_p", "pvary", "pcast"}


def elementwise(op: Op) -> OpRule:
    """Unite dimensions position by position; scalars and dimensions of size 1 are broadcast."""
    return _rule(op.ins, op.outs)


def passing(op: Op) -> OpRule:
    """Unite each result with the operand at the same place."""
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
    **{name: passing if name in _PASSING else elementwise for name in _NAMES},
    "bitcast_convert_type": bitcast,
}
