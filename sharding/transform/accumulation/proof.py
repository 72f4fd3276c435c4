"""The proof that a loss comes in parts: its whole program read and its passes counted, or one sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...errors import UserError, nearest_divisors
from ...program.dims import batch_rows
from ...program.jaxpr import Traced
from ...program.program import Program
from ...program.tracing import read
from .graph import PartGraph, Reading
from .levels import Levels, levels
from .rules import rule_of
from .shared import sliced
from .values import Held, Kind, NotInParts, examples

# Passes over the parts that a plan may take unless it is told otherwise.
MAX_PASSES = 3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InParts:
    """A traced loss as what each of `parts` parts does of it; `params`, `batch`, `state` are its arguments.

    `apart` are places of results that only the whole batch gives, with the reason.
    """

    graph: PartGraph
    parts: int
    rows: int
    pre: int
    result: Any
    params: tuple[Held, ...]
    batch: tuple[Held, ...]
    state: tuple[Held, ...]
    outs: tuple[Held, ...]
    apart: Mapping[int, NotInParts]
    levels: Levels

    @property
    def arguments(self) -> tuple[Held, ...]:
        """All of them, as their leaves."""
        return (*self.params, *self.batch, *self.state)

    def too_many(self, max_passes: int) -> NotInParts | None:
        """Return why this is not worth it; None if it takes few enough passes."""
        passes = self.levels.passes
        if passes <= max_passes:
            return None
        deepest = max((op for op in self.graph.ops if op.is_total), key=lambda op: op.outs[0].level)
        return NotInParts(
            f"it takes {passes} passes over the batch, since sums over the examples wait for one another, "
            f"and max_passes is {max_passes}",
            deepest.where,
        )


def rows_of(traced: Traced) -> int:
    """Return the rows of the batch that a loss was traced on.

    Arrays that lead with other numbers (tables, keys) are told from examples by what the loss does of them.
    """
    leads = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(traced.args[1]) if jnp.ndim(leaf)}
    if len(leads) > 1:
        return batch_rows(_program(traced))
    return next(iter(leads), 0)


def check_rows(rows: int, parts: int) -> None:
    """Raise UserError if `parts` do not divide the rows."""
    if rows == 0 or rows % parts:
        near = nearest_divisors(rows, parts)
        raise UserError(f"microbatches={parts} does not divide the batch of {rows} rows; nearest: {near}")


def in_parts(traced: Traced, parts: int, *, by_block: bool = False) -> InParts:
    """Read a traced ``loss(params, batch)``, or with a state, as work done in `parts` parts.

    Rows go to parts by stride, which keeps a sharded batch where it is, or by block.

    Raises NotInParts, with the user's line, if its value or gradients cannot be had so; UserError if the rows
    do not divide.
    """
    rows = rows_of(traced)
    check_rows(rows, parts)
    as_long = frozenset(
        n for n, leaf in enumerate(jax.tree.leaves(traced.args[1])) if jnp.shape(leaf)[:1] == (rows,)
    )
    pre = 1 if by_block else rows // parts
    try:
        return _read(traced, parts, rows, pre, as_long)
    except NotInParts as why:
        # A table may be as long as the batch: what meets no other array along its rows is one, perhaps.
        told = _led(traced) & as_long
        if not told or told == as_long:
            raise
        try:
            return _read(traced, parts, rows, pre, told)
        except NotInParts:
            raise why from None


def _led(traced: Traced) -> frozenset[int]:
    """Return which arrays of the batch lead with the rows, by what the loss does of them."""
    program = _program(traced)
    data = [one for one in program.arguments if one.position == 1]
    return frozenset(n for n, one in enumerate(data) if one.dims and one.dims[0] == program.batch_dims)


def _program(traced: Traced) -> Program:
    return read(traced, state=tuple(range(2, len(traced.args))))


def _read(traced: Traced, parts: int, rows: int, pre: int, led: Collection[int]) -> InParts:
    """Read a traced loss in parts, of whose batch the arrays numbered `led` are examples."""
    params, batch, *_ = traced.args
    ties: frozenset[int] = frozenset()
    while True:
        graph = PartGraph(parts, Reading(rule=rule_of, slice=sliced), cut=True, ties=ties)
        jaxpr = traced.jaxpr.jaxpr
        count, beyond = len(jax.tree.leaves(params)), len(jax.tree.leaves((params, batch)))
        ins = [Held(tuple(v.aval.shape), v.aval.dtype, heavy=n < count) for n, v in enumerate(jaxpr.invars)]
        for number in led:
            ins[count + number].form = examples(0, pre)
        found = graph.read(traced.jaxpr, ins)
        outs, apart = _completed(graph, found)
        shared = [value for value in ins[count:] if value.kind is Kind.SHARED]
        plan = levels(
            graph, ins[:count], shared, outs[0], [one for n, one in enumerate(outs) if n and n not in apart]
        )
        extremes = {
            id(op.ins[0].op.eqn) for op in plan.learnt if op.ins[0].combine in ("max", "min") and op.ins[0].op
        }
        if extremes <= ties:
            break
        ties |= extremes
    return InParts(
        graph=graph,
        parts=parts,
        rows=rows,
        pre=pre,
        result=traced.result,
        params=tuple(ins[:count]),
        batch=tuple(ins[count:beyond]),
        state=tuple(ins[beyond:]),
        outs=tuple(outs),
        apart=apart,
        levels=plan,
    )


def proved(traced: Traced, parts: int, max_passes: int | None = None) -> InParts:
    """Return `in_parts`. Raises UserError, one sentence with the user's line, for what it refuses.

    With `max_passes` more passes over the parts are refused too.
    """
    try:
        found = in_parts(traced, parts)
        why = None if max_passes is None else found.too_many(max_passes)
        if why is not None:
            raise why
    except NotInParts as refused:
        raise UserError(refusal(parts, refused, has_state=len(traced.args) > 2)) from None
    return found


def refusal(parts: int, why: NotInParts, *, has_state: bool = False) -> str:
    """Say that `parts` do not give the whole batch's values, and what there is instead.

    A loss's state has no mean of parts.
    """
    told = f"microbatches={parts} would change the result: {why}"
    return told if has_state else f"{told}; accumulation='by part' takes the mean of the parts all the same"


def _completed(graph: PartGraph, found: Sequence[Held]) -> tuple[list[Held], dict[int, NotInParts]]:
    if found[0].kind is Kind.MIXED:
        assert found[0].why is not None
        raise found[0].why
    outs = [graph.complete(found[0])]
    apart: dict[int, NotInParts] = {}
    for number, value in enumerate(found[1:], 1):
        if value.kind is Kind.MIXED:
            assert value.why is not None
            apart[number] = value.why
        outs.append(value if value.kind in (Kind.EXAMPLES, Kind.MIXED) else graph.complete(value))
    return outs, apart


def apart_in_words(read: InParts, paths: Sequence[str]) -> tuple[str, ...]:
    """Say which results, by their `paths`, are computed of the whole batch at once, and why."""
    return tuple(
        f"aux {paths[n].removeprefix('1/')!r} is computed from the whole batch at once, since {why}"
        for n, why in read.apart.items()
    )
