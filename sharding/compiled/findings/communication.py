"""Findings about collectives: exchanges that the plan does not have, or that the compiler made larger."""

from __future__ import annotations

from ...hlo.text import HloModule
from ...plans.proof import Finding
from ...plans.specs import axes_in
from ..evidence import Evidence, StepCollective
from .lines import MATTERS, by_line, is_send, waits

#: A device that reads at most so many times its own part of a result needed that part alone; what is above 1
#: leaves room for padding.
SCATTERED = 1.5

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
    return by_line(
        evidence,
        "all_gather_became_all_reduce",
        chosen,
        what="gathered over {axes} by an all-reduce of a shard put into zeros, {runs} times a step",
        remedy="the compiler has no all-gather for groups of this shape: lay the axis along one torus "
        "axis, or split it, one mesh axis for each torus axis, gathered one inside the other, "
        "or make it smaller",
        saved=0.5,
    )


def reduced_whole(evidence: Evidence) -> list[Finding]:
    """Return all-reduces of which each device keeps a part: a reduce-scatter would send half the bytes."""
    chosen = [
        seen
        for seen in evidence.collectives
        if seen.collective.kind == "all_reduce" and _wanted_scattered(evidence, seen)
    ]
    return by_line(
        evidence,
        "reduce_scatter_became_all_reduce",
        chosen,
        what="reduced whole over {axes} and then sliced to each device's part, {runs} times a step",
        remedy="the compiler grants a reduce-scatter over one torus axis: lay the axis along one, or "
        "split it, one mesh axis for each torus axis, reduced one after the other",
        saved=0.5,
    )


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
    return by_line(
        evidence,
        "reduced_in_loop",
        chosen,
        what=f"gradients reduced over {{axes}} {{runs}} times a step, in each of "
        f"microbatches={planned.microbatches}; once after them is enough",
        remedy="rows are worked through by hand, and gradients reduced once, where the axes that cut "
        "them cut nothing else and the batch divides by microbatches times those axes",
        saved=1.0 - 1.0 / planned.microbatches,
    )


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
    return by_line(
        evidence,
        "unplanned_resharding",
        chosen,
        what="{collective} over {axes} that the plan does not have, {runs} times a step",
        remedy="the value here has one sharding and its reader wants another: declare the dimension's "
        "axes where it is made, or let both sides be sharded alike",
    )


def replicated_to_reshard(evidence: Evidence) -> list[Finding]:
    """Return all-gathers of which each device then keeps a part: XLA's fallback between two shardings."""
    chosen = []
    for seen in evidence.collectives:
        if seen.collective.kind == "all_gather" and seen.collective.axes:
            share = evidence.share_read(seen.collective.end)
            if share is not None and share * len(seen.collective.groups[0]) < SCATTERED:
                chosen.append(seen)
    return by_line(
        evidence,
        "involuntary_full_rematerialisation",
        chosen,
        what="gathered whole over {axes}, then sliced again: no shorter way between two shardings",
        remedy="shard the value's maker and reader over the same axes in the same order, "
        "or put a reshape between them that keeps the sharded dimension whole",
    )


def overlaps_nothing(evidence: Evidence) -> list[Finding]:
    """Return collectives beside which nothing is computed; `spread.send_not_overlapped` tells of sends."""
    chosen = [seen for seen in evidence.collectives if waits(seen) and not is_send(seen)]
    return by_line(
        evidence,
        "overlaps_nothing",
        chosen,
        what="{collective} over {axes}, {runs} times a step, no computing beside it",
        remedy="compile with asynchronous collectives for this chip, or give each device more work "
        "between collectives: a larger batch per device, fewer microbatches, a smaller axis",
        least=MATTERS,
    )


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
