"""Findings about computation: recomputed by the compiler, or of unknown cost."""

from __future__ import annotations

from ...hlo.frames import nearest_line
from ...hlo.text import SourceLine
from ...plans.proof import Finding
from ..evidence import Evidence
from ..roofline import target
from .communication import MATTERS

# In the names of instructions that XLA recomputes when a program would not fit otherwise.
_AGAIN = ".remat"


def rematerialised(evidence: Evidence) -> list[Finding]:
    """Return what the compiler recomputes for lack of memory, beyond what the plan recomputes."""
    found: dict[SourceLine | None, float] = {}
    for name, cost, runs in evidence.instruction_costs():
        if _AGAIN in name:
            line = nearest_line(evidence.module, name)
            found[line] = found.get(line, 0.0) + cost.seconds * runs
    return [
        Finding(
            kind="compiler_rematerialised",
            what="computed again by the compiler, because the step would not fit otherwise",
            remedy="plan it instead: a fuller `remat`, values kept on the host, more microbatches",
            seconds=seconds,
            source=line,
        )
        for line, seconds in found.items()
        if seconds > MATTERS * evidence.step_seconds
    ]


def unknown_loops(evidence: Evidence) -> list[Finding]:
    """Return loops of unknown trip count: their bodies count once, so that the step is longer than stated."""
    return [
        Finding(
            kind="unknown_trip_count",
            what=f"the trip count of loop {loop.name} is not known; its body is counted once",
            remedy="use `lax.scan` or `fori_loop` with a fixed number of iterations",
            source=nearest_line(evidence.module, loop.name),
        )
        for loop in evidence.loops.values()
        if loop.trip_count is None
        and evidence.run_counts.get(evidence.module.instructions[loop.name].computation)
    ]


def unpriced_kernels(evidence: Evidence) -> list[Finding]:
    """Return kernels without a cost of the compiler's or of their author's: only their bytes are counted."""
    found: dict[tuple[str, SourceLine | None], float] = {}
    for name, cost, runs in evidence.instruction_costs():
        if cost.basis == "unknown":
            key = (target(evidence.module.instructions[name]), nearest_line(evidence.module, name))
            found[key] = found.get(key, 0.0) + runs
    return [
        Finding(
            kind="unpriced_kernel",
            what=f"{called} runs {runs:.0f} times a step and states no cost: its bytes alone are counted",
            remedy="give `pallas_call` a `cost_estimate`",
            source=line,
        )
        for (called, line), runs in found.items()
    ]
