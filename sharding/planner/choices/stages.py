"""Pipeline stages as the planner prices them: what they cut, and how a stage may be worked through."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping

from ...cost.stacks import held_layers
from ...hardware.topology import Topology
from ...plans.vocabulary import DELAYED, GPIPE, ONE_BY_ONE
from ...program.mixtures import experts_dims
from ...xla.compiler import compiler_of
from ..declared import Declared
from .draft import Draft, Given, Refused
from .layers import AUTOMATIC, stacks_over_stages, why_no_chunks, why_no_stages
from .microbatches import indivisible

# Chunks a stage holds, where they are not declared: each divides the bubble and repeats every send.
CHUNKS = (1, 2, 4, 8)
# Schedules, where none is declared.
_SCHEDULES = (ONE_BY_ONE, DELAYED)


def choices(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield the layers cut over ``stage``, with numbers of chunks that a stage may hold.

    Stages share the rows of a microbatch, all of them if these divide so. Chunks that would fill up more
    slots than one chunk does are left out where they are not declared.
    """
    stages = draft.mesh.get("stage", 1)
    if stages == 1:
        yield draft
        return
    found = given.layers
    if reason := why_no_stages(given.program, found, stages):
        yield Refused(sizes={"stage": stages}, reason=reason)
        return
    assert found is not None
    if reason := _mixed(given, draft):
        yield Refused(sizes={axis: size for axis, size in draft.mesh.items() if size > 1}, reason=reason)
        return
    axes = {axis: draft.mesh[axis] for axis in draft.batch}
    count = given.declared.microbatches or 1
    if given.rows % (needed := math.prod(axes.values()) * count):
        yield Refused(sizes={**axes, "stage": stages}, reason=indivisible(given.rows, axes, count, needed))
        return
    declared = given.declared.interleave
    least = held_layers(found.count, stages, 1)
    for chunks in CHUNKS if declared is None else (declared,):
        if declared is None and (chunks > 1 and given.declared.schedule == GPIPE):
            continue
        if declared is None and held_layers(found.count, stages, chunks) > least:
            continue
        reason, cut = given.once((choices, stages, chunks), functools.partial(_cut, given, stages, chunks))
        if reason is None:
            yield dataclasses.replace(draft, dims={**draft.dims, **cut}, interleave=chunks)
        elif declared is not None:
            yield Refused(sizes={"stage": stages}, reason=reason)


def _cut(given: Given, stages: int, chunks: int) -> tuple[str | None, dict[int, tuple[str, ...]]]:
    """Return why stages do not hold so many chunks of the layers, or None, and what they cut."""
    reason = why_no_chunks(given.program, stages, chunks)
    return reason, {one.dim: ("stage",) for one in stacks_over_stages(given.program, stages, chunks)}


def ways(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield the ways to work stages through: schedules, and whether a stage runs its chunks again.

    They change nothing of where anything lies.
    """
    for schedule, again in ways_of(given.declared, given.topology, draft.mesh, keeps=given.keeps):
        yield dataclasses.replace(draft, schedule=schedule, stage_remat=again)


def ways_of(
    declared: Declared, topology: Topology, mesh: Mapping[str, int], *, keeps: bool
) -> Iterator[tuple[str, bool]]:
    """Yield schedules, each with whether a stage runs its chunks again: it need not if it `keeps` theirs."""
    if mesh.get("stage", 1) == 1:
        yield ONE_BY_ONE, True
        return
    whole = why_whole(topology, mesh) is not None
    offered = _SCHEDULES[:1] if whole else _SCHEDULES
    schedules = offered if declared.schedule is None else (declared.schedule,)
    # What is kept goes over the ticks of schedules that run.
    free = declared.stage_remat is None and keeps and declared.schedule != GPIPE and not whole
    again = (True, False) if free else (declared.stage_remat is not False,)
    yield from itertools.product(schedules, again)


def why_whole(topology: Topology, mesh: Mapping[str, int]) -> str | None:
    """Return why a chunk's passes are not to be cut in two on `mesh`, as other ways than 1F1B need."""
    beside = next((axis for axis in AUTOMATIC if mesh.get(axis, 1) > 1), None)
    if beside is None or not compiler_of(topology).passes_whole:
        return None
    return (
        f"{compiler_of(topology).name} ends itself on what stages keep over ticks, and on delayed gradients, "
        f"beside {beside}={mesh[beside]}"
    )


def _mixed(given: Given, draft: Draft) -> str | None:
    """Return why no pipeline of a draft runs: an axis that cuts rows cuts parameters' own dims too.

    Over those of experts tokens are exchanged.
    """
    experts = given.once(experts_dims, lambda: experts_dims(given.program))
    for dim, axes in draft.dims.items():
        if dim in experts:
            continue
        both = next((axis for axis in axes if axis in draft.batch and draft.mesh[axis] > 1), None)
        if both is not None and dim not in given.program.data_dims:
            name = given.program.dims[dim].name
            return (
                f"{both}={draft.mesh[both]} cuts the batch and {name}, and stages take the batch apart by "
                f"hand; beside stages {name} may lie over tensor, or whole: rules={{{name!r}: None}}"
            )
    return None
