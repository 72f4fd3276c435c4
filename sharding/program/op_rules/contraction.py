"""Matrix multiplications and their kin."""

from __future__ import annotations

from typing import Any

from .rule import Builder, Op, OpRule, Rule


def dot_general(op: Op) -> OpRule:
    """Unite contracting with contracting, batch with batch and result, free with result.

    The result is laid out as [batch…, lhs free…, rhs free…]. Operands beyond the two, such as a scaled
    product's block scales, are kept whole.
    """
    builder = Builder(op)
    _dot(builder, op, op.params["dimension_numbers"])
    return builder.done()


def ragged_dot_general(op: Op) -> OpRule:
    """Rows of the left side, in consecutive groups, each times its group's matrix on the right.

    Three forms, by the role of the ragged dimension of the left side: free ([m, k] · [g, k, n] → [m, n]),
    contracting ([m, k] · [k, n] → [g, m, n]) and batch.
    """
    numbers = op.params["ragged_dot_dimension_numbers"]
    (lhs_contract, _), _ = numbers.dot_dimension_numbers
    groups = op.ins[2]
    builder = Builder(op)
    grouped = bool(set(numbers.lhs_ragged_dimensions) & set(lhs_contract))
    if grouped:
        builder.factor("map", groups[-1], [(2, len(groups) - 1)], [(0, 0)])
    _dot(builder, op, numbers.dot_dimension_numbers, int(grouped), tuple(numbers.rhs_group_dimensions))
    return builder.done()


def _dot(builder: Builder, op: Op, numbers: Any, out: int = 0, groups: tuple[int, ...] = ()) -> None:
    """Add a product's factors: the result's dimensions from `out` on; `groups` are some of the right's."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
    lhs = op.ins[0]
    for a, b in zip(lhs_batch, rhs_batch, strict=True):
        builder.factor("map", lhs[a], [(0, a), (1, b)], [(0, out)])
        out += 1
    for a, b in zip(lhs_contract, rhs_contract, strict=True):
        builder.factor("contract", lhs[a], [(0, a), (1, b)])
    for operand, taken in ((0, {*lhs_batch, *lhs_contract}), (1, {*rhs_batch, *rhs_contract})):
        for dim, size in enumerate(op.ins[operand]):
            if operand == 1 and dim in groups:
                builder.factor("group", size, [(1, dim), (2, len(op.ins[2]) - 1)])
            elif dim not in taken:
                builder.factor("map", size, [(operand, dim)], [(0, out)])
                out += 1


RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot_general,
    "scaled_dot": dot_general,
}
