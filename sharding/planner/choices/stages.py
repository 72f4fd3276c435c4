"""Pipeline stages as the planner prices them: what they cut, and how a stage may be worked through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ...errors import UserError, nearest, nearest_divisors
from ...plans.vocabulary import SCHEDULES
from .draft import Draft, Given, Layers, Refused

# Model chunks a stage holds are no more than this: each divides the bubble and repeats every send.
_MOST_CHUNKS = 8


def choices(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield the layers cut over ``stage``, with every number of model chunks that a stage may hold.

    Without a declared schedule it is 1F1B, which takes as long as GPipe and holds less.
    """
    stages = draft.mesh.get("stage", 1)
    if stages == 1:
        yield draft
        return
    found = given.layers
    if reason := _why_not(found, stages):
        yield Refused(sizes={"stage": stages}, reason=reason)
        return
    assert found is not None
    schedule = given.declared.schedule or "1f1b"
    for chunks in range(1, 1 + (_MOST_CHUNKS if schedule == "1f1b" else 1)):
        if found.count // stages % chunks == 0:
            yield dataclasses.replace(
                draft, dims={**draft.dims, found.dim: ("stage",)}, schedule=schedule, interleave=chunks
            )


def _why_not(found: Layers | None, stages: int) -> str | None:
    """Return why a program cannot be cut into so many stages; None if it can."""
    if found is None:
        return f"stage={stages} cuts the layers of a scan over stacked parameters, and this program has none"
    if found.written_out:
        return f"stage={stages} cuts parameters that are stacked, and these layers' are arrays of their own"
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
