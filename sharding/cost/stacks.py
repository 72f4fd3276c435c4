"""Of which stacks of layers a stage has a part, what of each, and what travels through each."""

from __future__ import annotations

import functools
import math

import numpy as np

from ..program.layers import cuts_beside
from .profile import LAYERS, ProgramTables

# Programs, stages and chunks of which is remembered what stages have: a search asks for each many times.
_KNOWN = 256
_remembered = functools.lru_cache(maxsize=_KNOWN)


def held_layers(layers: int, stages: int, chunks: int) -> int:
    """Return for how many layers a stage has room: as many as every other, its chunks alike.

    >>> held_layers(61, 8, 2)
    8
    """
    return chunks * math.ceil(layers / (stages * chunks))


def is_moved(layers: int, stages: int, chunks: int) -> bool:
    """Whether stages store other layers than they run."""
    return stages > 1 and (chunks > 1 or layers % stages > 0)


@_remembered
def cut_stacks(profile: ProgramTables, stages: int, chunks: int) -> tuple[int, ...]:
    """Return which of a program's scans over layers stages cut, as they run; others are shared by rows."""
    return tuple(
        n
        for n, layers in enumerate(profile.counts)
        if n == profile.main or (cuts_beside(layers, stages, chunks) and _has_parameters(profile, n))
    )


@_remembered
def worked_share(profile: ProgramTables, stages: int, chunks: int) -> float:
    """Return which part of the work of all layers a stage has; slots without a layer count too."""
    products, values = profile.products, profile.values
    runs = profile.steps.runs[products.equation]
    weights = _by_stack(profile, values.stack[products.values[:, 2]], products.flops * runs)
    cut = cut_stacks(profile, stages, chunks)
    each = [_part(profile, n, stages, chunks) if n in cut else 1 / stages for n in range(profile.stacks)]
    return _mean(profile, weights, each, stages, chunks)


@_remembered
def held_share(profile: ProgramTables, stages: int, chunks: int) -> float:
    """Return which part of the parameters of all layers a stage has: of those shared by rows, all."""
    table = profile.parameters
    sizes = table.elements * table.item_bytes * (table.section == LAYERS)
    cut = cut_stacks(profile, stages, chunks)
    each = [_part(profile, n, stages, chunks) if n in cut else 1.0 for n in range(profile.stacks)]
    return _mean(profile, _by_stack(profile, table.stack, sizes), each, stages, chunks)


def shares(
    profile: ProgramTables, stack: np.ndarray, sizes: np.ndarray, stages: int, chunks: int
) -> list[float]:
    """Return which part of all layers' bytes a stage has of each stack that stages cut.

    `sizes` are bytes of what belongs to a `stack` each, one that is no layers' to -1.
    """
    weights = _by_stack(profile, stack, sizes)
    total = float(weights.sum())
    if profile.stacks == 1 or not total:
        return [held_layers(profile.layers, stages, chunks) / profile.layers]
    cut = cut_stacks(profile, stages, chunks)
    return [float(weights[n]) * _part(profile, n, stages, chunks) / total for n in cut]


@_remembered
def moved_parameters(profile: ProgramTables, stages: int, chunks: int) -> np.ndarray:
    """Return of which parameters [P] stages store others than they run."""
    moved = [n for n in cut_stacks(profile, stages, chunks) if is_moved(profile.counts[n], stages, chunks)]
    table = profile.parameters
    return (table.section == LAYERS) & np.isin(table.stack, moved)


@_remembered
def whole_parameters(profile: ProgramTables, stages: int, chunks: int) -> np.ndarray:
    """Return which parameters [P] of layers each stage has all of."""
    table = profile.parameters
    there = np.isin(table.stack, cut_stacks(profile, stages, chunks))
    return (table.section == LAYERS) & (table.stack >= 0) & ~there


def _part(profile: ProgramTables, stack: int, stages: int, chunks: int) -> float:
    layers = profile.counts[stack]
    return held_layers(layers, stages, chunks) / layers


def _mean(profile: ProgramTables, weights: np.ndarray, each: list[float], stages: int, chunks: int) -> float:
    total = float(weights.sum())
    if profile.stacks == 1 or not total:
        return held_layers(profile.layers, stages, chunks) / profile.layers
    return float(weights @ np.array(each)) / total


def _has_parameters(profile: ProgramTables, stack: int) -> bool:
    table = profile.parameters
    return bool(((table.stack == stack) & (table.runs > 1)).any())


def _by_stack(profile: ProgramTables, stack: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.bincount(stack + 1, weights=weights, minlength=1 + profile.stacks)[1:]
