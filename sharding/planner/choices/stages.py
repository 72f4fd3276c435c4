"""Pipeline stages as the planner prices them: what they cut, and how a stage may be worked through."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from ...cost.candidate import Candidate
from ...errors import UserError, nearest, nearest_divisors
from ...plans.vocabulary import SCHEDULES
from ...program.program import Program

# Model chunks a stage holds are no more than this: each divides the bubble and repeats every send.
_MOST_CHUNKS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """The dimension of the layers that most parameters are stacked in."""

    dim: int
    name: str
    count: int


def layers(program: Program) -> Layers | None:
    """Return what pipeline stages cut, None for a program without a scan over stacked parameters."""
    sizes = {dim.id: 0 for dim in program.dims if dim.stacked}
    for argument in program.parameters:
        for dim in {dim for composition in argument.dims for dim in composition}.intersection(sizes):
            sizes[dim] += math.prod(argument.shape)
    if not sizes:
        return None
    most = program.dims[max(sizes, key=lambda dim: (sizes[dim], -dim))]
    return Layers(dim=most.id, name=most.name, count=most.size)


def why_not(found: Layers | None, stages: int) -> str | None:
    """Return why a program cannot be cut into so many stages; None if it can."""
    if found is None:
        return f"stage={stages} cuts the layers of a scan over stacked parameters, and this program has none"
    if found.count % stages:
        near = nearest_divisors(found.count, stages)
        return f"stage={stages} does not divide {found.name}={found.count}; nearest: {near}"
    return None


def check_schedule(schedule: str | None, mesh_stages: int | None) -> None:
    """Raise UserError for a schedule that is unknown or has no stages to order."""
    if schedule is None:
        return
    if schedule not in SCHEDULES:
        raise UserError(f"schedule={schedule!r} is unknown; {nearest(schedule, SCHEDULES)}")
    if mesh_stages in (None, 1):
        raise UserError(f"schedule={schedule!r} orders pipeline stages and the mesh declares none")


def worked_through(layout: Candidate, found: Layers | None, schedule: str | None) -> Iterator[Candidate]:
    """Yield `layout` with every number of model chunks a stage may hold.

    Without a declared schedule it is 1F1B, which takes as long as GPipe and holds less.
    """
    stages = layout.mesh.get("stage", 1)
    if stages == 1 or found is None:
        yield layout
        return
    named = dataclasses.replace(layout, schedule=schedule or "1f1b")
    for chunks in range(1, 1 + (_MOST_CHUNKS if named.schedule == "1f1b" else 1)):
        if found.count // stages % chunks == 0:
            yield dataclasses.replace(named, interleave=chunks)
