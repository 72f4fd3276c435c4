"""Bytes that a candidate takes at least, found before it is laid over its program."""

from __future__ import annotations

from collections.abc import Mapping

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
    parts = _parts(candidate, params)

    def parts_of(storage: Mapping[int, Storage]) -> np.ndarray:
        return _parts(candidate, [storage.get(n, spec) for n, spec in zip(arguments, params, strict=True)])

    of_moments = parts_of(candidate.optimizer)
    same = candidate.gradients is candidate.optimizer
    of_gradients = of_moments if same else parts_of(candidate.gradients)
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
    known: dict[int, float] = {}
    found = []
    for spec in specs:
        parts = known.get(id(spec))
        if parts is None:
            parts = 1.0
            for axis in {
                axis for axes in (candidate.dims.values() if spec is None else spec) for axis in axes
            }:
                parts *= mesh.get(axis, 1)
            known[id(spec)] = parts
        found.append(parts)
    return np.array(found)
