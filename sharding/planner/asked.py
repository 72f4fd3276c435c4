"""A size of an axis that no search offers by itself, priced when it is asked for: ``stage=8``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeVar

from ..errors import UserError
from ..plans.record import Record
from .build import alternatives_of
from .choices.mesh import OFFERED
from .inputs import ROOMS

if TYPE_CHECKING:
    from .outcome import Search

_Plan = TypeVar("_Plan", bound=Record)

# Axes that are taken where they are declared, and may be asked about.
ASKED = ("stage", "context")


def with_asked(plan: _Plan, search: Search | None, subject: str | None) -> _Plan:
    """Return `plan` with the best layout of the size that `subject` asks about among its alternatives.

    It is the plan itself where its search has an answer or is not known, or nothing is asked of a size.
    """
    if search is None or not isinstance(subject, str):
        return plan
    axis, _, size = subject.partition("=")
    if axis in OFFERED or axis not in ASKED or axis in plan.mesh or not size.isdigit() or int(size) < 1:
        return plan
    plan = dataclasses.replace(plan, mesh={**plan.mesh, axis: 1})
    if int(size) == 1:
        return plan
    declared = dataclasses.replace(search.declared, mesh={**search.declared.mesh, axis: int(size)})
    try:
        answer = search.problem.solve(search.topology, declared, rooms=ROOMS)
    except UserError as error:
        return dataclasses.replace(plan, refused={**plan.refused, subject: str(error)})
    best = search.answer.found.best
    found = answer.found.best or next(iter(answer.found.misfits), None)
    if found is None or best is None:
        return plan
    rows = alternatives_of(answer.program, best, [found], answer.capacity_bytes, answer.stored)
    return dataclasses.replace(plan, alternatives=(*plan.alternatives, *rows))
