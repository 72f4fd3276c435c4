"""What a plan's proof answers: which collectives run over an axis, what was found, and of which parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..words import gib, seconds

if TYPE_CHECKING:
    from ..plans.proof import CompiledCollective, Finding
    from ..plans.record import Record

# Collectives below this part of all that run over an axis are summed up.
_WORTH_NAMING = 0.01
# Findings named where nobody asked for a certain one.
_SHOWN = 3


def of_plan(plan: Record) -> list[str]:
    """Return what the compiler says of the whole of `plan`; nothing without a proof."""
    proof = plan.proof
    if proof is None:
        return []
    items = sorted(proof.time.items(), key=lambda row: -row[1])
    spent = ", ".join(f"{name} {seconds(time)}" for name, time in items if time >= 0.02 * proof.step_seconds)
    lines = [
        f"compiled, a step takes {seconds(proof.step_seconds)}: {spent}",
        f"compiled, a device holds {gib(proof.peak_bytes)} at most",
    ]
    costliest = sorted(proof.findings, key=lambda row: (-row.seconds, -row.bytes))
    return [*lines, *(f"found: {_sentence(row)}" for row in costliest[:_SHOWN])]


def of_axis(plan: Record, axis: str) -> list[str]:
    """Return what runs over a mesh axis in the compiled step; nothing without a proof or of one device."""
    proof = plan.proof
    if proof is None or plan.mesh[axis] == 1:
        return []
    rows = [row for row in proof.collectives if axis in row.axes]
    if not rows:
        return [f"compiled: no collective runs over {axis}"]
    exposed = sum(row.exposed_seconds for row in rows)
    waits = f"computing waits for {seconds(exposed)} of it" if exposed else "computing waits for none of it"
    return [f"compiled: {', '.join(_summed(rows))}; {waits}, of a step of {seconds(proof.step_seconds)}"]


def of_parameter(plan: Record, path: str) -> list[str]:
    """Return what the compiler's findings say of a parameter; nothing if they do not name it."""
    if plan.proof is None:
        return []
    # As JAX writes a leaf's place in a tree: ``params['layers']['up']``.
    keys = "".join(f"['{key}']" for key in path.split("/"))
    return [
        f"found: {_sentence(row)}"
        for row in plan.proof.findings
        if keys in row.what or path in row.what.split()
    ]


def _summed(rows: Iterable[CompiledCollective]) -> list[str]:
    """Write collectives of one kind over the same axes as one, the longest first, the shortest together."""
    found: dict[str, list[CompiledCollective]] = {}
    for row in rows:
        found.setdefault(f"{row.kind}/{'×'.join(row.axes)}", []).append(row)
    busy = {name: sum(row.seconds for row in same) for name, same in found.items()}
    named = [name for name in busy if busy[name] >= _WORTH_NAMING * sum(busy.values())]
    told = [
        f"{name} {sum(row.count for row in found[name]):,.0f} times, "
        f"{gib(sum(row.bytes for row in found[name]))} in {seconds(busy[name])}"
        for name in sorted(named, key=lambda name: -busy[name])
    ]
    rest = sum(time for name, time in busy.items() if name not in named)
    return [*told, f"the rest in {seconds(rest)}"] if rest else told


def _sentence(row: Finding) -> str:
    where = "" if row.source is None else f" ({row.source.file}:{row.source.line})"
    cost = f", {seconds(row.seconds)} a step" if row.seconds else f", {gib(row.bytes)}" if row.bytes else ""
    return f"{row.what}{where}{cost}" + (f"; {row.remedy}" if row.remedy else "")
