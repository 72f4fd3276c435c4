"""How much of a GPU's memory JAX reserves: what more of it would win, and what its compiler is told of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..hardware.memory import FRACTIONS, usable_bytes
from ..hardware.topology import Topology
from ..plans.estimate import Estimate
from ..words import gib
from ..xla.compiler import compiler_of
from .inputs import Supposing
from .supposing import Case

# What public training scripts set where three quarters are too little (github Physical-Intelligence/openpi,
# README); the rest stays for the driver, NCCL and cuDNN.
_SHARE = 0.9
# Times as fast that a step has to become to be told of.
_WORTH = 1.02
# Of the memory that XLA's scheduler works within, percent, and what it takes unless told (openxla/xla
# xla/debug_options_flags.cc).
MEMORY_OPTION, _USUAL = "xla_gpu_memory_limit_slop_factor", 95


def notes_on(case: Case) -> tuple[str, ...]:
    """Say how long a step is if JAX reserves more of each GPU; nothing where that wins little or is so."""
    chip = case.topology.chip
    if chip.platform != "gpu" or chip.hbm_bytes is None or not case.fits:
        return ()
    more = _SHARE * chip.hbm_bytes / usable_bytes(chip)
    if more <= 1.0:
        return ()
    best = case.best(Supposing(), memory=more)
    if case.gain(*best) < _WORTH:
        return ()
    return (
        f"JAX reserves {gib(usable_bytes(chip))} of a GPU's {gib(chip.hbm_bytes)}; with "
        f"{FRACTIONS[0]}={_SHARE} {case.in_words(*best)}",
    )


def options_of(topology: Topology, estimate: Estimate | None) -> dict[str, int]:
    """Return the compiler's option for a step that may use more of a GPU than its scheduler expects.

    The scheduler works within ``(share x memory - arguments) x factor``, whatever JAX reserves, and runs
    again what would not fit there: the factor is that with which arguments and all come to what JAX reserves.
    """
    chip, within = topology.chip, compiler_of(topology).schedules_within
    if within >= 1.0 or chip.hbm_bytes is None or estimate is None:
        return {}
    arguments = sum(estimate.memory.get(name, 0.0) for name in ("params", "optimizer", "batch"))
    left = within * chip.hbm_bytes - arguments
    factor = 100 * (usable_bytes(chip) - arguments) / left if left > 0 else 0.0
    return {MEMORY_OPTION: math.ceil(factor)} if factor > _USUAL else {}


def declared_options(
    topology: Topology, estimate: Estimate | None, options: Mapping[str, bool | int | float | str]
) -> dict[str, bool | int | float | str]:
    """Return those of a plan's options that are not `options_of` it."""
    own = options_of(topology, estimate)
    return {name: value for name, value in options.items() if own.get(name) != value}
