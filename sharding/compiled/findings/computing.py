"""Findings about what is computed, and about what could not be read."""

from __future__ import annotations

from ...hlo.frames import nearest_line
from ...hlo.text import SourceLine
from ...plans.proof import Finding
from ..evidence import Evidence
from ..roofline import target
from .communication import MATTERS

# XLA's own rematerialisation, when a program would not fit otherwise, names its copies so.
_AGAIN = ".remat"


def rematerialised(evidence: Evidence) -> list[Finding]:
    """What the compiler computes again because memory ran short, beyond the plan's own recomputation."""
    found: dict[SourceLine | None, float] = {}
    for computation, runs in evidence.weights.items():
        for name, done in evidence.works(computation):
            if _AGAIN in name:
                line = nearest_line(evidence.program, name)
                found[line] = found.get(line, 0.0) + done.seconds * runs
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
    """Loops whose turns could not be read: what is inside counts once, and the step is longer than stated."""
    return [
        Finding(
            kind="unknown_trip_count",
            what=f"nothing says how often the loop {loop.name} turns; its inside is counted once",
            remedy="use `lax.scan` or `fori_loop` with a fixed number of turns",
            source=nearest_line(evidence.program, loop.name),
        )
        for loop in evidence.loops.values()
        if loop.turns is None and evidence.weights.get(evidence.program.instructions[loop.name].computation)
    ]


def unpriced_kernels(evidence: Evidence) -> list[Finding]:
    """Kernels that neither the compiler nor their author gave a cost: counted by the bytes they touch."""
    found: dict[tuple[str, SourceLine | None], float] = {}
    for computation, runs in evidence.weights.items():
        for name, done in evidence.works(computation):
            if done.basis == "unknown":
                instruction = evidence.program.instructions[name]
                key = (target(instruction), nearest_line(evidence.program, name))
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
