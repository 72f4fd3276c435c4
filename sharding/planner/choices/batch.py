"""Axes that the batch is cut over, and the dims that they cut with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ...plans.specs import cut_into
from .draft import Draft, Given, Refused
from .microbatches import indivisible

# Where experts have an axis, each of its devices brings tokens of its own.
_AXES = ("data", "fsdp", "expert")


def choices(given: Given, draft: Draft) -> Iterator[Draft | Refused]:
    """Yield the batch over its axes: all leading dims that these divide, then the batch's own alone."""
    mesh, batch = draft.mesh, draft.kept.batch
    if batch is None:
        batch = tuple(axis for axis in _AXES if mesh.get(axis, 1) > 1)
        if draft.storing or not given.leads:
            batch = tuple(axis for axis in batch if axis != "fsdp")
    if reason := _why_not(given, batch, draft):
        yield Refused(sizes={axis: mesh[axis] for axis in batch}, reason=reason)
        return
    divisible = [dim for dim in given.leads if given.program.dims[dim].size % cut_into(batch, mesh) == 0]
    ways = [dict.fromkeys(divisible, batch)] if batch else [{}]
    if batch and len(divisible) > 1:
        ways.append({divisible[0]: batch})
    for dims in ways:
        # Rules come last: what they fix stays so.
        yield dataclasses.replace(draft, batch=batch, dims={**dims, **draft.dims})


def _why_not(given: Given, batch: Sequence[str], draft: Draft) -> str | None:
    count = given.declared.microbatches or 1
    if not batch and given.rows % count == 0:
        return None
    if batch and not given.leads:
        return "no array of the data has a dimension that parameters lack"
    needed = cut_into(batch, draft.mesh)
    main = given.program.dims[given.leads[0]]
    if given.rows % (needed * count):
        sizes = {axis: draft.mesh[axis] for axis in batch}
        return indivisible(given.rows, sizes, count, needed * count)
    if main.size % needed:
        return f"the batch is used in {main.size} parts, which {needed} does not divide"
    return None
