"""Into how many microbatches a batch may be cut, and when it may not be at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import UserError, nearest_divisors
from ...program import batch_mixing, batch_reduction
from ...program.program import Program


def why_not(program: Program) -> str | None:
    """Return why the losses of parts of the batch do not add up to the loss of the batch; None if they do."""
    rows = {argument.shape[:1] for argument in program.arguments if argument.is_data}
    if len(rows) != 1 or () in rows:
        return "the arrays of the batch do not all lead with the same number of rows"
    for result in program.results[1:]:
        if result.shape:
            return f"the loss returns an array of shape {result.shape} at {result.path!r} beside its value"
    if mixings := batch_mixing(program):
        first = mixings[0]
        return f"its loss mixes examples: {first.reason}, at {first.where}"
    kind = batch_reduction(program)
    if kind == "sum":
        return "its loss is a sum over the batch; return the mean"
    if kind == "ratio" and not any(result.path == "1/weight" for result in program.results):
        return (
            "its loss is a weighted mean and nothing says how much each part of the batch weighs; "
            'return (loss, {"weight": the sum of weights})'
        )
    return None


def why_untraceable(loss: Callable[[Any, Any], Any], params: Any, batch: Any, rows: int) -> str | None:
    """Return why the loss of a part of the batch's `rows` cannot even be traced; None if it can."""
    import jax

    part = rows // next((d for d in divisors(rows) if d > 1), 1)

    def first(leaf: Any) -> Any:
        if leaf.shape[:1] != (rows,):
            return leaf
        return jax.ShapeDtypeStruct((part, *leaf.shape[1:]), leaf.dtype)

    try:
        jax.eval_shape(loss, params, jax.tree.map(first, batch))
    except Exception as error:  # The user's own function may raise anything where its sizes do not agree.
        said = next(iter(str(error).splitlines()), type(error).__name__)
        return f"the loss has its {rows} rows written into it and fails on {part} of them: {said}"
    return None


def check(microbatches: int, reason: str | None) -> None:
    """Raise UserError for a number that is none, or if there is a `reason` against more than one part."""
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise UserError(f"microbatches={microbatches!r} is no whole number from 1")
    if microbatches > 1 and reason:
        raise UserError(f"microbatches={microbatches} would change the result, since {reason}")


def options(rows_of_device: int) -> Sequence[int]:
    """Return the numbers of microbatches to consider for the rows of one device: powers of two, and all."""
    return tuple(m for m in divisors(rows_of_device) if m == rows_of_device or m & (m - 1) == 0)


def batch_rows(program: Program) -> int:
    """Return the rows of the batch, 1 if no array of the data has any."""
    data = [a for a in program.arguments if a.is_data and a.shape]
    leads = [a.shape[0] for a in data if a.dims[0] == program.batch_dims] or [a.shape[0] for a in data]
    return max(leads, key=leads.count, default=1)


def indivisible(rows: int, parts: Mapping[str, int], microbatches: int, needed: int) -> str:
    """Return the sentence for a batch that does not divide, with the nearest that does."""
    factors = {**parts, "microbatches": microbatches} if microbatches > 1 else dict(parts)
    written = " x ".join(f"{name}={size}" for name, size in factors.items())
    written += f" = {needed}" if len(factors) > 1 else ""
    below = rows // needed * needed
    near = f"{below} or {below + needed} rows" if below else f"{needed} rows"
    devices = needed // microbatches
    if microbatches > 1 and rows and rows % devices == 0:
        near += f", or microbatches={nearest_divisors(rows // devices, microbatches)}"
    return f"a batch of {rows} rows does not divide by {written}; nearest: {near}"


def divisors(number: int) -> Sequence[int]:
    """Return the divisors of `number`, smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
