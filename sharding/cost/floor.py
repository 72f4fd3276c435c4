"""Bytes that a candidate takes at least, found before it is laid over its program."""

from __future__ import annotations

import math

import numpy as np

from .candidate import Candidate, Storage
from .pipeline import lockstep, summed
from .profile import LAYERS, ProgramTables
from .stacks import held_share

# What sums in another order may be less by.
_ROUNDED = 1.0 - 1e-9


def stored_at_least(
    profile: ProgramTables, candidate: Candidate, slot_bytes: float, gradient_bytes: float | None
) -> float:
    """Return the bytes of a device that `pipeline.moments` says at least, whatever is kept and run again.

    They are those of parameters, their moments and gradients, in any number of microbatches: of gradients
    those that lie as they or their parameters do, in the more parts of both.

    Args:
        profile: the program's tables.
        candidate: where parameters, moments and gradients are stored.
        slot_bytes: of the optimizer's arrays for each element that is trained.
        gradient_bytes: of one accumulated gradient; as the parameter's if None.
    """
    ticks, table = lockstep(candidate), profile.parameters
    arguments = table.argument.tolist()
    params = [candidate.stored.get(n) for n in arguments]
    moments, gradients = (
        [of.get(n, spec) for n, spec in zip(arguments, params, strict=True)]
        for of in (candidate.optimizer, candidate.gradients)
    )
    parts, of_moments, of_gradients = (_parts(candidate, specs) for specs in (params, moments, gradients))
    stored = _by_section(profile, table.item_bytes / parts)
    found = stored + _by_section(profile, slot_bytes * table.trained / of_moments)
    here = np.ones(3)
    if ticks.stages > 1:
        here[LAYERS] = held_share(profile, ticks.stages, ticks.chunks)
        of_params = _by_section(profile, table.item_bytes * (1.0 - table.state) / parts)
        return float((found + summed(profile, of_params)) @ here) * _ROUNDED
    each = table.item_bytes if gradient_bytes is None else gradient_bytes
    found += _by_section(profile, each * table.trained / np.maximum(parts, of_gradients))
    return float(found @ here) * _ROUNDED


def _by_section(profile: ProgramTables, each: np.ndarray) -> np.ndarray:
    table = profile.parameters
    return np.bincount(table.section, weights=table.elements * each, minlength=3)


def _parts(candidate: Candidate, specs: list[Storage | None]) -> np.ndarray:
    """Return over how many devices of a stage each parameter [P] lies, at most where no spec is given."""
    mesh = {**candidate.mesh, "stage": 1}
    known: dict[int, int] = {}
    for spec in specs:
        if id(spec) not in known:
            entries = candidate.dims.values() if spec is None else spec
            known[id(spec)] = math.prod(mesh.get(axis, 1) for axis in {a for axes in entries for a in axes})
    return np.array([known[id(spec)] for spec in specs], float)
