"""What more of a GPU's memory would win than JAX reserves, said of a plan with the variable that gives it."""

from __future__ import annotations

from ..hardware.memory import FRACTIONS, usable_bytes
from ..words import gib
from .inputs import Supposing
from .supposing import Case

# What public training scripts set where three quarters are too little (github Physical-Intelligence/openpi,
# README); the rest stays for the driver, NCCL and cuDNN.
_SHARE = 0.9
# Times as fast that a step has to become to be told of.
_WORTH = 1.02


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
