"""What must hold of any plan, whoever wrote it: known axes and policies, sizes that divide."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import UserError, nearest, nearest_divisors
from ..hardware.axes import AXES

if TYPE_CHECKING:
    from .plan import ArrayPlan, Plan


def check_plan(plan: Plan) -> None:
    """Raise UserError, one sentence, for the first thing in `plan` that cannot be carried out."""
    from ..cost.candidate import SCHEDULES
    from ..transform.remat import NAMES, PLACES, POLICIES
    from .choices.attention import check_kernels

    if plan.remat not in (*POLICIES, NAMES):
        raise UserError(f"remat={plan.remat!r} is not a policy; {nearest(plan.remat, POLICIES)}")
    for name, place in plan.saved.items():
        if place not in PLACES:
            raise UserError(f"{name} is kept on {place!r}; {nearest(place, PLACES)}")
    if plan.saved and plan.remat != NAMES:
        raise UserError(f"remat={plan.remat!r} keeps no named values; remat='names' does")
    check_kernels(plan.kernels)
    for name, size in (
        *plan.mesh.items(),
        ("microbatches", plan.microbatches),
        ("interleave", plan.interleave),
    ):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"{name}={size!r} must be a whole number of at least 1")
    if plan.schedule is not None and plan.schedule not in SCHEDULES:
        raise UserError(f"schedule={plan.schedule!r} is unknown; {nearest(plan.schedule, SCHEDULES)}")
    for axis in plan.mesh:
        if axis not in AXES:
            raise UserError(f"mesh axis {axis!r} is not known; {nearest(axis, AXES)}")
    for kind, arrays in (("parameter", plan.params), ("batch array", plan.batch)):
        for path, row in arrays.items():
            _check_array(plan, f"{kind} {path!r}", row)
    for name, dim in plan.dims.items():
        _check_axes(plan, f"dimension {name!r}", dim.axes)


def check_runs(plan: Plan) -> None:
    """Raise UserError for a plan that can be priced and cannot be run yet."""
    if plan.mesh.get("stage", 1) > 1:
        raise UserError(
            f"stage={plan.mesh['stage']}: pipeline stages are priced by the planner and cannot be run yet; "
            "plan without the stage axis"
        )


def _check_array(plan: Plan, what: str, row: ArrayPlan) -> None:
    if len(row.spec) > len(row.shape):
        raise UserError(
            f"{what} has {len(row.shape)} dimensions but its spec {row.spec} has {len(row.spec)} entries"
        )
    entries = [axes_of(entry) for entry in row.spec]
    _check_axes(plan, what, tuple(axis for entry in entries for axis in entry))
    for size, axes in zip(row.shape, entries, strict=False):
        parts = math.prod(plan.mesh[axis] for axis in axes)
        if size % parts:
            written = " x ".join(f"{axis}={plan.mesh[axis]}" for axis in axes)
            near = nearest_divisors(size, parts)
            raise UserError(f"{what}: {written} does not divide a dimension of size {size}; nearest: {near}")


def _check_axes(plan: Plan, what: str, axes: tuple[str, ...]) -> None:
    for axis in axes:
        if axis not in plan.mesh:
            raise UserError(f"{what} is sharded over {axis!r}; {nearest(axis, plan.mesh)}")
        if axes.count(axis) > 1:
            raise UserError(f"{what} uses {axis} twice; an axis shards one dimension at most")


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes that one entry of a spec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
