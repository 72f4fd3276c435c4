"""Matrix multiplications and their kin."""

from __future__ import annotations

from .rule import Builder, Op, OpRule, Rule


def dot_general(op: Op) -> OpRule:
    """Unite contracting with contracting, batch with batch and result, free with result.

    The result is laid out as [batch…, lhs free…, rhs free…].
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = op.params["dimension_numbers"]
    return _dot(op, lhs_contract, rhs_contract, lhs_batch, rhs_batch)


def _dot(op: Op, lhs_contract, rhs_contract, lhs_batch, rhs_batch) -> OpRule:
    lhs, rhs = op.ins[:2]
    builder = Builder(op)
    out = 0
    for a, b in zip(lhs_batch, rhs_batch, strict=True):
        builder.factor("map", lhs[a], [(0, a), (1, b)], [(0, out)])
        out += 1
    for a, b in zip(lhs_contract, rhs_contract, strict=True):
        builder.factor("contract", lhs[a], [(0, a), (1, b)])
    for operand, shape, taken in (
        (0, lhs, {*lhs_batch, *lhs_contract}),
        (1, rhs, {*rhs_batch, *rhs_contract}),
    ):
        for dim, size in enumerate(shape):
            if dim not in taken:
                builder.factor("map", size, [(operand, dim)], [(0, out)])
                out += 1
    return builder.done()


def ragged_dot_general(op: Op) -> OpRule:
    """Rows of the left side, in consecutive groups, each times its group's matrix on the right.

    Three forms, by the role of the ragged dimension of the left side: free ([m, k] · [g, k, n] → [m, n]),
    contracting ([m, k] · [k, n] → [g, m, n]) and batch.
    """
    numbers = op.params["ragged_dot_dimension_numbers"]
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    ragged = set(numbers.lhs_ragged_dimensions)
    rhs_group = list(numbers.rhs_group_dimensions)
    lhs, rhs, groups = op.ins[:3]
    builder = Builder(op)
    out = 0
    if ragged & set(lhs_contract):
        builder.factor("map", groups[-1], [(2, len(groups) - 1)], [(0, 0)])
        out = 1
    for a, b in zip(lhs_batch, rhs_batch, strict=True):
        builder.factor("map", lhs[a], [(0, a), (1, b)], [(0, out)])
        out += 1
    for a, b in zip(lhs_contract, rhs_contract, strict=True):
        builder.factor("contract", lhs[a], [(0, a), (1, b)])
    for dim, size in enumerate(lhs):
        if dim not in {*lhs_batch, *lhs_contract}:
            builder.factor("map", size, [(0, dim)], [(0, out)])
            out += 1
    for dim in rhs_group:
        builder.factor("group", rhs[dim], [(1, dim), (2, len(groups) - 1)])
    for dim, size in enumerate(rhs):
        if dim not in {*rhs_batch, *rhs_contract, *rhs_group}:
            builder.factor("map", size, [(1, dim)], [(0, out)])
            out += 1
    return builder.done()


def scaled_dot(op: Op) -> OpRule:
    """A dot_general whose operands come with block scales; the scales are kept whole."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = op.params["dimension_numbers"]
    return _dot(op, lhs_contract, rhs_contract, lhs_batch, rhs_batch)


RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot_general,
    "scaled_dot": scaled_dot,
}
