"""What a compiler runs by itself that an estimate has beside other work, said of a plan with its seconds."""

from __future__ import annotations

import dataclasses

from ..words import seconds
from ..xla.compiler import compiler_of
from .inputs import Supposing
from .supposing import Case

# Of a step's seconds, less is not told of.
_TOLD = 0.02


def notes_on(case: Case) -> tuple[str, ...]:
    """Say how long a step is where each gather of parameters and reduction of gradients is waited for.

    Nothing where the compiler hides them, or where they are short.
    """
    compiler = compiler_of(case.topology)
    if not compiler.collectives_wait:
        return ()
    supposing = Supposing(
        execution=lambda own: dataclasses.replace(own, gathers_wait=1.0, scatters_wait=1.0, sums_wait=1.0)
    )
    pricer = case.problem.pricer(case.topology, case.declared, case.room, supposing).of(case.candidate)
    hidden, waited = case.estimate.step_seconds, pricer.price(case.candidate).step_seconds
    if waited < (1.0 + _TOLD) * hidden:
        return ()
    return (
        "the estimate has gathers of parameters and reductions of gradients beside other work, as options of "
        f"the compiler put them (--top tries such); without any, {compiler.name} for "
        f"{case.topology.chip.name} waits for each: {seconds(waited)} a step, not {seconds(hidden)}",
    )
