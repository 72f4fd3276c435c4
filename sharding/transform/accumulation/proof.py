"""The proof that a loss comes in parts: its whole program read and its passes counted, or one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...errors import UserError, nearest_divisors
from ...program.dims import batch_rows
from ...program.jaxpr import Traced
from ...program.program import Program
from ...program.tracing import read
from .derivatives import is_coarse
from .graph import PartGraph, Reading, is_share
from .levels import Levels, levels
from .prepared import OfData
from .rules import rule_of
from .shared import sliced
from .values import MIXED, Array, Held, Kind, NotInParts, examples, learns, needed

# Passes over the parts that a plan may take unless it is told otherwise.
MAX_PASSES = 3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InParts:
    """A traced loss as what each of `parts` parts does of it; `params`, `batch`, `state` are its arguments.

    The rows go to the parts as ``pre * parts * post``: `pre` blocks, of which each part has `post` rows.
    `apart` are places of results that only the whole batch gives, with the reason. `prepared` is made of the
    data alone before the parts, `of_data` makes it. `tables` are places of arrays of the batch that are as
    long as the rows and read whole by each part, with the reason why they are not cut.
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
    prepared: tuple[Held, ...] = ()
    of_data: OfData | None = None
    tables: Mapping[int, NotInParts] = dataclasses.field(default_factory=dict)

    @property
    def moves_rows(self) -> bool:
        """Whether rows that follow one another stay together, so that parts are not cut where devices are."""
        return self.pre * self.parts < self.rows

    def made(self, args: Sequence[Any]) -> list[Array]:
        """Return the arrays of `prepared`, over the whole batch, for the arguments of the loss."""
        if self.of_data is None:
            return []
        return self.of_data.make(
            self.prepared, dict(zip(self.arguments, jax.tree.leaves(tuple(args)), strict=True))
        )

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
            f"it takes {passes} passes over the batch, since sums over the examples wait for one another; "
            f"max_passes={max_passes} is less, and max_passes={passes} takes them",
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


def in_parts(traced: Traced, parts: int, *, by_block: bool = False, prepares: bool = True) -> InParts:
    """Read a traced ``loss(params, batch)``, or with a state, as work done in `parts` parts.

    Rows go to parts by stride, which keeps a sharded batch where it is, or by block. Where rows meet in
    groups that follow one another (answers of one question, pairs), as few stay together as make a group.
    Where rows of the data alone meet otherwise (shuffled, sorted, mixed), that is made before the parts, if
    it `prepares`.

    Raises NotInParts, with the user's line, if its value or gradients cannot be had so; UserError if the rows
    do not divide.
    """
    rows = rows_of(traced)
    check_rows(rows, parts)
    if by_block and any(eqn.primitive.name == "shard_map" for eqn in traced.jaxpr.eqns):
        raise NotInParts("the loss has a manual region of its own (jax.shard_map), which lies in no other")
    read = functools.partial(_placed, pre=1) if by_block else _near_each_other
    try:
        return read(traced, parts, rows, prepares=False)
    except NotInParts as why:
        if not prepares:
            raise
        try:
            return read(traced, parts, rows, prepares=True)
        except NotInParts:
            raise why from None


def _near_each_other(traced: Traced, parts: int, rows: int, *, prepares: bool) -> InParts:
    """Read a traced loss in parts with as few rows together as it takes, by stride if it is as good."""
    apart = rows // parts
    try:
        found = _placed(traced, parts, rows, apart, prepares=prepares)
    except NotInParts as why:
        try:
            found = _placed(traced, parts, rows, 1, prepares=prepares)
        except NotInParts:
            raise why from None
    else:
        if found.levels.passes == 1 and not found.apart and not found.graph.opened:
            return found
        try:
            block = _placed(traced, parts, rows, 1, prepares=prepares)
        except NotInParts:
            return found
        if _effort(block) >= _effort(found):
            return found
        found = block
    # The fewer rows stay together, the fewer move between devices.
    for together in range(2, apart):
        if apart % together == 0:
            with contextlib.suppress(NotInParts):
                grouped = _placed(traced, parts, rows, apart // together, prepares=prepares)
                if _effort(grouped) <= _effort(found):
                    return grouped
    return found


def _effort(read: InParts) -> tuple[int, int, int]:
    """Return how many manual regions are opened, the passes, and how many results are computed `apart`."""
    return len(read.graph.opened), read.levels.passes, len(read.apart)


def _placed(traced: Traced, parts: int, rows: int, pre: int, *, prepares: bool) -> InParts:
    """Read a traced loss whose rows go to the parts as ``pre * parts * post``."""
    as_long = frozenset(
        n for n, leaf in enumerate(jax.tree.leaves(traced.args[1])) if jnp.shape(leaf)[:1] == (rows,)
    )
    try:
        return _read(traced, parts, rows, pre, as_long, prepares)
    except NotInParts as why:
        # A table may be as long as the batch: what meets no other array along its rows is one, perhaps.
        told = _led(traced) & as_long
        if not told or told == as_long:
            raise
        try:
            found = _read(traced, parts, rows, pre, told, prepares)
        except NotInParts:
            raise why from None
        if not any(op.is_total for op in found.graph.ops):
            # Nothing is computed of what was taken for examples.
            raise
        read = {one for op in found.graph.ops for one in op.ins}
        return dataclasses.replace(
            found, tables={n: why for n in sorted(as_long - told) if found.batch[n] in read}
        )


def _led(traced: Traced) -> frozenset[int]:
    """Return which arrays of the batch lead with the rows, by what the loss does of them."""
    program = _program(traced)
    data = [one for one in program.arguments if one.position == 1]
    return frozenset(n for n, one in enumerate(data) if one.dims and one.dims[0] == program.batch_dims)


def _program(traced: Traced) -> Program:
    return read(traced, state=tuple(range(2, len(traced.args))))


def _read(traced: Traced, parts: int, rows: int, pre: int, led: Collection[int], prepares: bool) -> InParts:
    """Read a traced loss in parts, of whose batch the arrays numbered `led` are examples."""
    params, batch, *_ = traced.args
    ties: frozenset[int] = frozenset()
    while True:
        elements = sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(batch))
        of_data = OfData(rows=rows, pre=pre, elements=elements) if prepares else None
        graph = PartGraph(parts, Reading(rule=rule_of, slice=sliced), cut=True, ties=ties, of_data=of_data)
        jaxpr = traced.jaxpr.jaxpr
        count, beyond = len(jax.tree.leaves(params)), len(jax.tree.leaves((params, batch)))
        ins = [Held(tuple(v.aval.shape), v.aval.dtype, heavy=n < count) for n, v in enumerate(jaxpr.invars)]
        for number in led:
            ins[count + number].form = examples(0, pre)
        found = graph.read(traced.jaxpr, ins)
        outs, apart = _completed(graph, found)
        prepared = _used(graph, outs, of_data)
        shared = [value for value in (*ins[count:], *prepared) if value.kind is Kind.SHARED]
        plan = levels(
            graph, ins[:count], shared, outs[0], [one for n, one in enumerate(outs) if n and n not in apart]
        )
        extremes = {
            id(op.ins[0].op.eqn) for op in plan.learnt if op.ins[0].combine in ("max", "min") and op.ins[0].op
        }
        if not extremes:
            break
        if extremes <= ties:
            raise NotInParts("what a maximum over the examples gives on has a gradient that is not followed")
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
        prepared=tuple(prepared),
        of_data=of_data,
    )


def _used(graph: PartGraph, outs: Sequence[Held], of_data: OfData | None) -> list[Held]:
    """Return what is made ahead, as far as `outs` and the sums that they need take it."""
    if of_data is None:
        return []
    leaves, left = set[Held](), list(outs)
    while left:
        _, found = needed(left)
        left = [value.op.ins[0] for value in found - leaves if value.op is not None]
        leaves |= found
    return [value for value in of_data.lines if value in leaves]


def proved(
    traced: Traced, parts: int, max_passes: int | None = None, *, trained: Collection[int] = ()
) -> InParts:
    """Return `in_parts`. Raises UserError, one sentence with the user's line, for what it refuses.

    With `max_passes` more passes over the parts are refused too, and gradients of those leaves of the
    parameters that are `trained` where parts' shares would be rounded coarsely.
    """
    try:
        found = in_parts(traced, parts)
        why = None if max_passes is None else found.too_many(max_passes)
        why = why or _coarse(found, trained)
        if why is not None:
            raise why
    except NotInParts as refused:
        raise UserError(refusal(parts, refused, has_state=len(traced.args) > 2)) from None
    return found


def _coarse(read: InParts, trained: Collection[int]) -> NotInParts | None:
    """Return why a trained parameter of a coarse type has no gradient of shares; None if there is none."""
    moved = {read.params[n] for n in trained if is_coarse(read.params[n].dtype)}
    types = {value.dtype for value in moved}
    for op in read.graph.ops if moved else ():
        if op.stops_gradient or not any(value in moved for value in op.ins):
            continue
        if any(is_share(out) for out in op.outs):
            reason = (
                f"the gradient of a parameter of {next(iter(types))} is rounded to that, and would be of "
                "each part's share: train it in a wider type"
            )
            return NotInParts(reason, read.graph.where(op.eqn) if op.eqn is not None else "")
        moved.update(out for out in op.outs if learns(out))
    return None


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
        if value.form.is_moved:
            value = dataclasses.replace(value, form=MIXED, why=NotInParts("a sort has moved the examples"))
        if value.kind is Kind.MIXED:
            assert value.why is not None
            apart[number] = value.why
        outs.append(value if value.kind in (Kind.EXAMPLES, Kind.MIXED) else graph.complete(value))
    return outs, apart


def prepared_bytes(read: InParts) -> tuple[float, float]:
    """Return the bytes of what is made of the data ahead: in rows of the batch, and of what parts share."""
    sizes = [0.0, 0.0]
    for value in read.prepared:
        sizes[value.kind is not Kind.EXAMPLES] += math.prod(value.shape) * value.dtype.itemsize
    return sizes[0], sizes[1]


def prepared_in_words(read: InParts) -> tuple[str, ...]:
    """Say what is made of the whole batch's data before the parts, and why."""
    if read.of_data is None or not read.prepared:
        return ()
    reasons = "; ".join(dict.fromkeys(str(read.of_data.lines[value]) for value in read.prepared))
    count = len(read.prepared)
    made = "an array is" if count == 1 else f"{count} arrays are"
    said = f"{made} made of the whole batch's data before its {read.parts} parts, since {reasons}"
    return (f"{said}; what is computed of some rows alone is computed at once" if _at_once(read) else said,)


def _at_once(read: InParts) -> bool:
    """Whether as much as a part's rows is made ahead, and parameters work on it outside of the parts."""
    held = {
        one
        for one in read.prepared
        if one.kind is Kind.SHARED and one.shape and one.shape[0] * read.parts >= read.rows
    }
    for op in read.graph.ops:
        if not op.is_total and any(one in held for one in op.ins):
            held.update(out for out in op.outs if out.kind is Kind.SHARED)
    return any(one.heavy and len(one.shape) > 1 for one in held)


def apart_in_words(read: InParts, paths: Sequence[str]) -> tuple[str, ...]:
    """Say which results, by their `paths`, are computed of the whole batch at once, and why."""
    return tuple(
        f"aux {paths[n].removeprefix('1/')!r} is computed from the whole batch at once, since {why}"
        for n, why in read.apart.items()
    )


def tables_in_words(read: InParts, paths: Sequence[str]) -> tuple[str, ...]:
    """Say which arrays of the batch, by their `paths`, each part reads whole though they are as long."""
    return tuple(
        f"batch {paths[n]!r} is as long as the batch, and each part reads it whole and computes what is "
        f"computed of it: cut like the rows, {why}"
        for n, why in read.tables.items()
    )


def silent_in_words(read: InParts) -> tuple[str, ...]:
    """Say what gives nothing to the loss, and is left out."""
    found = dict.fromkeys(read.graph.silent)
    return (f"microbatches leave out what gives nothing to the loss: {', '.join(found)}",) if found else ()


def opened_in_words(read: InParts) -> tuple[str, ...]:
    """Say which manual regions are laid out by XLA, and why."""
    return tuple(
        "a manual region (jax.shard_map) is run as what all its devices do together, laid out by XLA, "
        f"since {why}"
        for why in dict.fromkeys(map(str, read.graph.opened))
    )
