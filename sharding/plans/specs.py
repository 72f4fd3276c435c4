"""One layout for arrays of other sizes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest
from ..paths import by_path

if TYPE_CHECKING:
    from .record import ArrayPlan, Plan


def resized(plan: Plan, params: Any, batch: Any) -> Plan:
    """Return `plan` for `params` and `batch`, see `Plan.resized`."""
    rows = {
        "params": _rows("parameter", plan.params, params),
        "batch": _rows("batch array", plan.batch, batch),
    }
    dims = {}
    for name, dim in plan.dims.items():
        whole = (plan.params, plan.batch)[dim.argument][dim.path].shape[dim.dimension]
        size = rows["params" if dim.argument == 0 else "batch"][dim.path].shape[dim.dimension]
        if whole * dim.size % size and size * dim.size % whole:
            raise UserError(f"{name}={dim.size} of {dim.path!r} does not keep its share of {whole} in {size}")
        # A part of a dimension that is several in one grows and shrinks with the whole.
        dims[name] = dataclasses.replace(dim, size=dim.size * size // whole)
    return dataclasses.replace(
        plan,
        **rows,
        dims=dims,
        origin=None,
        estimate=None,
        proof=None,
        alternatives=(),
        refused={},
        search=None,
    )


def _rows(kind: str, planned: Any, tree: Any) -> dict[str, ArrayPlan]:
    have = {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}
    for path in [*planned, *have]:
        if path not in have:
            raise UserError(f"the plan has a {kind} {path!r} that is not given; {nearest(path, have)}")
        if path not in planned:
            raise UserError(f"the plan has no {kind} {path!r}; {nearest(path, planned)}")
        if len(have[path]) != len(planned[path].shape):
            raise UserError(f"{kind} {path!r} has shape {have[path]}, not one like {planned[path].shape}")
    return {path: dataclasses.replace(row, shape=have[path]) for path, row in planned.items()}
