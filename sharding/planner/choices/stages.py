"""Pipeline stages as the planner prices them: what they cut, and how a stage may be worked through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ...errors import UserError, nearest
from ...plans.vocabulary import SCHEDULES
from .draft import Draft, Given, Refused
from .layers import why_no_stages

# Model chunks a stage holds are no more than this: each divides the bubble and repeats every send.
_MOST_CHUNKS = 8


def choices(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield the layers cut over ``stage``, with every number of model chunks that a stage may hold.

    Without a declared schedule it is 1F1B with one chunk, which is what runs; it takes as long as GPipe and
    holds less.
    """
    stages = draft.mesh.get("stage", 1)
    if stages == 1:
        yield draft
        return
    found = given.layers
    if reason := why_no_stages(found, stages):
        yield Refused(sizes={"stage": stages}, reason=reason)
        return
    assert found is not None
    schedule = given.declared.schedule or "1f1b"
    most = _MOST_CHUNKS if given.declared.schedule == "1f1b" else 1
    for chunks in range(1, 1 + most):
        if found.count // stages % chunks == 0:
            yield dataclasses.replace(
                draft, dims={**draft.dims, found.dim: ("stage",)}, schedule=schedule, interleave=chunks
            )


def check_schedule(schedule: str | None, mesh_stages: int | None) -> None:
    """Raise UserError for a schedule that is unknown or has no stages to order."""
    if schedule is None:
        return
    if schedule not in SCHEDULES:
        raise UserError(f"schedule={schedule!r} is unknown; {nearest(schedule, SCHEDULES)}")
    if mesh_stages in (None, 1):
        raise UserError(f"schedule={schedule!r} orders pipeline stages and the mesh declares none")
