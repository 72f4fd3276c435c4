"""Findings about collectives: exchanges that the plan does not have, or that the compiler made larger."""

from __future__ import annotations

from collections.abc import Iterable

from ...hlo.text import HloModule, SourceLine
from ...plans.proof import Finding
from ...plans.specs import axes_in
from ..evidence import Evidence, StepCollective

#: Findings below this share of a step are not shown: the estimates of seconds are no better than one per
#: cent.
MATTERS = 0.01
#: A collective overlaps nothing if at least this share of it is exposed; the rest is rounding and latency.
EXPOSED = 0.9
#: A device that reads at most so many times its own part of a result needed that part alone; what is above 1
#: leaves room for padding.
SCATTERED = 1.5
#: Collectives below this share of a step are part of another one, such as halo exchanges.
SMALL = 0.001

_ACTIVATIONS = frozenset({"tensor", "context", "expert", "stage"})
_GATHERING = frozenset({"all_gather", "all_to_all", "ragged_all_to_all", "collective_permute"})


def gathered_by_reduction(evidence: Evidence) -> list[Finding]:
    """Return all-reduces of a shard placed in zeros: an all-gather would have sent half the bytes."""
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.collective.kind == "all_reduce"
        and any(
            _placed_in_zeros(evidence.module, operand)
            for operand in evidence.module.instructions[seen.collective.inner].operands
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
        for axes, source, runs, exposed, bytes_ in by_line(chosen, SMALL * evidence.step_seconds)
    ]


def reduced_whole(evidence: Evidence) -> list[Finding]:
    """Return all-reduces of which each device keeps a part: a reduce-scatter would send half the bytes."""
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.collective.kind == "all_reduce" and _wanted_scattered(evidence, seen)
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
        for axes, source, runs, exposed, bytes_ in by_line(chosen, SMALL * evidence.step_seconds)
    ]


def reduced_each_time(evidence: Evidence) -> list[Finding]:
    """Return reductions over ``data`` in each microbatch, of gradients that are whole over it.

    Rows alone are cut over it, so that what is summed over it are gradients, and once a step is enough.
    """
    planned = evidence.planned
    if planned is None or planned.microbatches == 1:
        return []
    specs = [array.spec for array in planned.params.values()] + list(planned.moments.values())
    if any("data" in axes_in(spec) for spec in specs):
        return []
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.collective.kind in ("all_reduce", "reduce_scatter")
        and "data" in seen.collective.axes
        and seen.runs >= planned.microbatches
    ]
    return [
        Finding(
            kind="reduced_in_loop",
            what=f"gradients reduced over {axes} {runs:.0f} times a step, in each of "
            f"microbatches={planned.microbatches}; once after them is enough",
            remedy="rows are worked through by hand, and gradients reduced once, where the axes that cut "
            "them cut nothing else and the batch divides by microbatches times those axes",
            seconds=exposed * (1.0 - 1.0 / planned.microbatches),
            bytes=bytes_,
            source=source,
        )
        for axes, source, runs, exposed, bytes_ in by_line(chosen, SMALL * evidence.step_seconds)
    ]


def resharding(evidence: Evidence) -> list[Finding]:
    """Return exchanges of kinds that the plan has none of over their axes."""
    if evidence.planned is None:
        return []
    expected = _expected(evidence)
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.collective.kind in _GATHERING
        and seen.collective.axes
        and not any((seen.collective.kind, axis) in expected for axis in seen.collective.axes)
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
        for kind, alike in by_kind(chosen)
        for axes, source, runs, exposed, bytes_ in by_line(alike, SMALL * evidence.step_seconds)
    ]


def replicated_to_reshard(evidence: Evidence) -> list[Finding]:
    """Return all-gathers of which each device then keeps a part: XLA's fallback between two shardings."""
    chosen = []
    for seen in evidence.collectives:
        if seen.collective.kind == "all_gather" and seen.collective.axes:
            share = evidence.share_read(seen.collective.end)
            if share is not None and share * len(seen.collective.groups[0]) < SCATTERED:
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
        for axes, source, _, exposed, bytes_ in by_line(chosen, SMALL * evidence.step_seconds)
    ]


def overlaps_nothing(evidence: Evidence) -> list[Finding]:
    """Return collectives beside which nothing is computed; `spread.send_not_overlapped` tells of sends."""
    least = MATTERS * evidence.step_seconds
    chosen = [seen for seen in evidence.collectives if waits(seen) and not is_send(seen)]
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
        for kind, alike in by_kind(chosen)
        for axes, source, runs, exposed, bytes_ in by_line(alike, least)
    ]


def is_send(seen: StepCollective) -> bool:
    """Whether stages hand something on."""
    return seen.collective.kind == "collective_permute" and "stage" in seen.collective.axes


def waits(seen: StepCollective) -> bool:
    """Whether nothing is computed beside a collective."""
    return bool(seen.seconds) and seen.exposed_seconds >= EXPOSED * seen.seconds


def by_kind(chosen: Iterable[StepCollective]) -> list[tuple[str, list[StepCollective]]]:
    """Return the collectives of each kind."""
    found: dict[str, list[StepCollective]] = {}
    for seen in chosen:
        found.setdefault(seen.collective.kind, []).append(seen)
    return sorted(found.items())


def by_line(
    chosen: Iterable[StepCollective], least_seconds: float
) -> list[tuple[str, SourceLine | None, float, float, float]]:
    """Return axes, line, runs, exposed seconds and bytes, summed over the collectives of those axes and line.

    Those that expose no more than `least_seconds` are left out.
    """
    found: dict[tuple[str, SourceLine | None], list[float]] = {}
    for seen in chosen:
        row = found.setdefault(("×".join(seen.collective.axes) or "none", seen.source), [0.0, 0.0, 0.0])
        row[0] += seen.runs
        row[1] += seen.exposed_seconds
        row[2] += seen.collective.bytes * seen.runs
    return [
        (axes, source, runs, exposed, bytes_)
        for (axes, source), (runs, exposed, bytes_) in found.items()
        if exposed > least_seconds
    ]


def _placed_in_zeros(module: HloModule, name: str, depth: int = 6) -> bool:
    """Whether a value is an array of zeros with a part of it updated."""
    instruction = module.instructions.get(name)
    if instruction is None or not depth:
        return False
    if instruction.opcode == "dynamic-update-slice":
        return _zeros(module, instruction.operands[0])
    if (inside := module.inside(instruction)) is not None:
        root = module.instructions[inside.root]
        while root.opcode in ("bitcast", "convert") and root.operands:
            root = module.instructions[root.operands[0]]
        if root.opcode != "dynamic-update-slice":
            return False
        base = module.instructions[root.operands[0]]
        if base.opcode == "parameter":
            place = int(base.literal or 0)
            return place < len(instruction.operands) and _zeros(module, instruction.operands[place])
        return _zeros(module, base.name)
    if (
        instruction.opcode in ("bitcast", "copy", "copy-start", "copy-done", "convert")
        and instruction.operands
    ):
        return _placed_in_zeros(module, instruction.operands[0], depth - 1)
    return False


def _zeros(module: HloModule, name: str, depth: int = 6) -> bool:
    instruction = module.instructions.get(name)
    if instruction is None or not depth:
        return False
    if instruction.opcode == "constant":
        return instruction.literal.strip() in ("0", "0.0", "-0", "false")
    if instruction.opcode in ("broadcast", "bitcast", "copy", "convert", "copy-start", "copy-done"):
        return bool(instruction.operands) and _zeros(module, instruction.operands[0], depth - 1)
    inside = module.inside(instruction)
    return inside is not None and _zeros(module, inside.root, depth - 1)


def _wanted_scattered(evidence: Evidence, seen: StepCollective) -> bool:
    size = len(seen.collective.groups[0]) if seen.collective.groups else 1
    share = evidence.share_read(seen.collective.end)
    return size > 1 and share is not None and share * size < SCATTERED


def _expected(evidence: Evidence) -> set[tuple[str, str]]:
    """Return (kind, mesh axis) of the exchanges that the plan has: gathers of parameters, of activations."""
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
