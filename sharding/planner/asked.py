"""What no search has worked out, priced when it is asked for: ``stage=8``, ``schedule=delayed``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UserError
from ..plans.record import Record
from ..plans.vocabulary import DELAYED, OF_STAGES, of_stages
from .build import alternatives_of
from .choices.mesh import OFFERED
from .choices.stages import why_whole
from .inputs import ROOMS

if TYPE_CHECKING:
    from .outcome import Search

_Plan = TypeVar("_Plan", bound=Record)

# Axes that are taken where they are declared, and may be asked about.
ASKED = ("stage", "context")


def with_asked(plan: _Plan, search: Search | None, subject: str | None) -> _Plan:
    """Return `plan` with the best layout of what `subject` asks about among its alternatives.

    That is a size of an axis, or how stages work. It is the plan itself where its search has an answer or is
    not known, or nothing is asked of such.
    """
    if search is None or not isinstance(subject, str):
        return plan
    axis, _, size = subject.partition("=")
    if axis in OF_STAGES:
        return _with_way(plan, search, axis, size)
    if not size.isdigit() or int(size) < 1:
        return plan
    if axis in plan.mesh:
        if _has_size(plan, axis, int(size)):
            return plan
        declared = search.declared.mesh
        if axis in declared:
            return dataclasses.replace(
                plan, refused={**plan.refused, subject: f"{axis}={declared[axis]} is declared"}
            )
        # In as much room as the others were given, to be compared with them.
        room = (search.answer.room,)
        return _with_best(plan, search, subject, room, mesh={**declared, axis: int(size)})
    if axis in OFFERED or axis not in ASKED:
        return plan
    plan = dataclasses.replace(plan, mesh={**plan.mesh, axis: 1})
    if int(size) == 1:
        return plan
    return _with_best(plan, search, subject, mesh={**search.declared.mesh, axis: int(size)})


def _has_size(plan: Record, axis: str, size: int) -> bool:
    """Whether the plan's search has a layout of that size, says why there is none, or none divides so."""
    devices = math.prod(plan.mesh.values())
    meshes = (plan.mesh, *(row.mesh for row in plan.alternatives))
    named = any(f"{axis}={size}" in written.split(" x ") for written in plan.refused)
    return named or devices % size != 0 or any(mesh.get(axis, 1) == size for mesh in meshes)


def _with_way(plan: _Plan, search: Search, name: str, written: str) -> _Plan:
    """Return the plan with the best that its stages do where they work otherwise, among its alternatives."""
    stages = plan.mesh.get("stage", 1)
    if stages == 1 or not written or (value := of_stages(name, written)) == getattr(plan, name):
        return plan
    in_two = value is False or value == DELAYED
    if in_two and (reason := why_whole(plan.topology, plan.mesh)) is not None:
        return dataclasses.replace(plan, refused={**plan.refused, f"{name}={written}": reason})
    mesh = {**search.declared.mesh, "stage": stages}
    return _with_best(plan, search, f"{name}={written}", mesh=mesh, **{name: value})


def _with_best(
    plan: _Plan, search: Search, subject: str, rooms: Sequence[float] = ROOMS, /, **more: Any
) -> _Plan:
    """Return the plan with the best of what is declared too among its alternatives, or why there is none."""
    try:
        declared = dataclasses.replace(search.declared, **more)
        answer = search.problem.solve(search.topology, declared, rooms=rooms)
    except UserError as error:
        return dataclasses.replace(plan, refused={**plan.refused, subject: str(error)})
    best = search.answer.found.best
    found = answer.found.best or next(iter(answer.found.misfits), None)
    if found is None or best is None:
        return plan
    rows = alternatives_of(answer.program, best, [found], answer.capacity_bytes, answer.stored)
    return dataclasses.replace(plan, alternatives=(*plan.alternatives, *rows))
