"""Findings about collectives."""

from __future__ import annotations

from collections.abc import Iterable

from ...hlo.text import Program, SourceLine
from ...plans.proof import Finding
from ...plans.specs import axes_in
from ..evidence import Evidence, Seen

#: Less than this share of a step is not worth a person's time: estimates are no better than a per cent.
MATTERS = 0.01
#: A collective counts as beside nothing when so much of it is exposed; the rest is rounding and starts.
EXPOSED = 0.9
#: Where each device reads no more than so many times its own share of a result, it wanted that share alone;
#: the half above 1 is room for padding.
SCATTERED = 1.5
#: Halo exchanges and roots of reductions are small permutes that belong to another collective.
SMALL = 0.001

_ACTIVATIONS = frozenset({"tensor", "context", "expert", "stage"})
_GATHERING = frozenset({"all_gather", "all_to_all", "ragged_all_to_all", "collective_permute"})


def gathered_by_reduction(evidence: Evidence) -> list[Finding]:
    """All-reduces of a shard put into zeros: an all-gather in disguise, which sends twice the bytes."""
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.site.kind == "all_reduce"
        and any(
            _placed_in_zeros(evidence.program, operand)
            for operand in evidence.program.instructions[seen.site.inner].operands
        )
    ]
    return [
        Finding(
            kind="all_gather_became_all_reduce",
            what=f"gathered over {axes} by an all-reduce of a shard put into zeros, {runs:.0f} times a step",
            remedy="the compiler has no all-gather for groups of this shape: lay the axis along one torus "
            "axis, or split it, one mesh axis for each torus axis, gathered one inside the other, "
            "or make it smaller",
            seconds=exposed / 2,
            bytes=bytes_,
            source=source,
        )
        for axes, source, runs, exposed, bytes_ in _by_line(chosen)
        if exposed > SMALL * evidence.step_seconds
    ]


def reduced_whole(evidence: Evidence) -> list[Finding]:
    """All-reduces of which each device keeps its own part: a reduce-scatter would send half the bytes."""
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.site.kind == "all_reduce" and _wanted_scattered(evidence, seen)
    ]
    return [
        Finding(
            kind="reduce_scatter_became_all_reduce",
            what=f"reduced whole over {axes} and then sliced to each device's part, {runs:.0f} times a step",
            remedy="the compiler grants a reduce-scatter over one torus axis: lay the axis along one, or "
            "split it, one mesh axis for each torus axis, reduced one after the other",
            seconds=exposed / 2,
            bytes=bytes_,
            source=source,
        )
        for axes, source, runs, exposed, bytes_ in _by_line(chosen)
        if exposed > SMALL * evidence.step_seconds
    ]


def resharding(evidence: Evidence) -> list[Finding]:
    """Exchanges over axes along which the plan moves nothing of that kind."""
    if evidence.planned is None:
        return []
    expected = _expected(evidence)
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.site.kind in _GATHERING
        and seen.site.axes
        and not any((seen.site.kind, axis) in expected for axis in seen.site.axes)
    ]
    return [
        Finding(
            kind="unplanned_resharding",
            what=f"{'all-gather' if kind == 'all_gather' else kind.replace('_', '-')} over {axes} "
            f"that the plan does not have, {runs:.0f} times a step",
            remedy="the value here has one sharding and its reader wants another: declare the dimension's "
            "axes where it is made, or let both sides be sharded alike",
            seconds=exposed,
            bytes=bytes_,
            source=source,
        )
        for kind in sorted({seen.site.kind for seen in chosen})
        for axes, source, runs, exposed, bytes_ in _by_line(seen for seen in chosen if seen.site.kind == kind)
        if exposed > SMALL * evidence.step_seconds
    ]


def replicated_to_reshard(evidence: Evidence) -> list[Finding]:
    """All-gathers of which each device then keeps a part: how XLA goes between shardings it cannot turn."""
    chosen = []
    for seen in evidence.collectives:
        if seen.site.kind == "all_gather" and seen.site.axes:
            share = evidence.share_read(seen.site.end)
            if share is not None and share * len(seen.site.groups[0]) < SCATTERED:
                chosen.append(seen)
    return [
        Finding(
            kind="involuntary_full_rematerialisation",
            what=f"gathered whole over {axes}, then sliced again: no shorter way between two shardings",
            remedy="shard the value's maker and reader over the same axes in the same order, "
            "or put a reshape between them that keeps the sharded dimension whole",
            seconds=exposed,
            bytes=bytes_,
            source=source,
        )
        for axes, source, _, exposed, bytes_ in _by_line(chosen)
        if exposed > SMALL * evidence.step_seconds
    ]


def overlaps_nothing(evidence: Evidence) -> list[Finding]:
    """Collectives that computing waits for, where that is a noticeable part of the step."""
    least = MATTERS * evidence.step_seconds
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.seconds and seen.exposed_seconds >= EXPOSED * seen.seconds
    ]
    return [
        Finding(
            kind="overlaps_nothing",
            what=f"{kind.replace('_', '-')} over {axes}, {runs:.0f} times a step, no computing beside it",
            remedy="compile with asynchronous collectives for this chip, or give each device more work "
            "between collectives: a larger batch per device, fewer microbatches, a smaller axis",
            seconds=exposed,
            bytes=bytes_,
            source=source,
        )
        for kind in sorted({seen.site.kind for seen in chosen})
        for axes, source, runs, exposed, bytes_ in _by_line(seen for seen in chosen if seen.site.kind == kind)
        if exposed > least
    ]


def _by_line(chosen: Iterable[Seen]) -> list[tuple[str, SourceLine | None, float, float, float]]:
    """Return axes, line, runs, exposed seconds, bytes of those alike, together."""
    found: dict[tuple[str, SourceLine | None], list[float]] = {}
    for seen in chosen:
        row = found.setdefault(("×".join(seen.site.axes) or "none", seen.source), [0.0, 0.0, 0.0])
        row[0] += seen.runs
        row[1] += seen.exposed_seconds
        row[2] += seen.site.bytes * seen.runs
    return [
        (axes, source, runs, exposed, bytes_) for (axes, source), (runs, exposed, bytes_) in found.items()
    ]


def _placed_in_zeros(program: Program, name: str, depth: int = 6) -> bool:
    """Whether a value is a part put into an array of zeros."""
    instruction = program.instructions.get(name)
    if instruction is None or not depth:
        return False
    if instruction.opcode == "dynamic-update-slice":
        return _zeros(program, instruction.operands[0])
    if (inside := program.inside(instruction)) is not None:
        root = program.instructions[inside.root]
        while root.opcode in ("bitcast", "convert") and root.operands:
            root = program.instructions[root.operands[0]]
        if root.opcode != "dynamic-update-slice":
            return False
        base = program.instructions[root.operands[0]]
        if base.opcode == "parameter":
            place = int(base.literal or 0)
            return place < len(instruction.operands) and _zeros(program, instruction.operands[place])
        return _zeros(program, base.name)
    if (
        instruction.opcode in ("bitcast", "copy", "copy-start", "copy-done", "convert")
        and instruction.operands
    ):
        return _placed_in_zeros(program, instruction.operands[0], depth - 1)
    return False


def _zeros(program: Program, name: str, depth: int = 6) -> bool:
    instruction = program.instructions.get(name)
    if instruction is None or not depth:
        return False
    if instruction.opcode == "constant":
        return instruction.literal.strip() in ("0", "0.0", "-0", "false")
    if instruction.opcode in ("broadcast", "bitcast", "copy", "convert", "copy-start", "copy-done"):
        return bool(instruction.operands) and _zeros(program, instruction.operands[0], depth - 1)
    inside = program.inside(instruction)
    return inside is not None and _zeros(program, inside.root, depth - 1)


def _wanted_scattered(evidence: Evidence, seen: Seen) -> bool:
    size = len(seen.site.groups[0]) if seen.site.groups else 1
    share = evidence.share_read(seen.site.end)
    return size > 1 and share is not None and share * size < SCATTERED


def _expected(evidence: Evidence) -> set[tuple[str, str]]:
    """Return (kind, mesh axis) of what the plan exchanges: gathered parameters, moved activations."""
    planned = evidence.planned
    assert planned is not None
    found: set[tuple[str, str]] = set()
    stored = {axis for array in planned.params.values() for axis in axes_in(array.spec)}
    moved = {axis for axis in planned.mesh if axis in _ACTIVATIONS}
    found |= {("all_gather", axis) for axis in stored | moved}
    found |= {(kind, axis) for kind in _GATHERING for axis in moved}
    for item in planned.estimate.time if planned.estimate is not None else ():
        kind, _, axes = item.partition("/")
        found |= {(kind, axis) for axis in axes.split("×")}
    return found
