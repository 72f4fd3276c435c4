"""Why a plan is as it is, from what it remembers of the search and what the compiler proved of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import UserError, nearest
from ..paths import by_suffix
from ..plans.origin import distinct
from ..plans.specs import axes_of
from ..words import gib, layout_in_words, seconds
from . import proved

if TYPE_CHECKING:
    from ..plans.origin import Alternative
    from ..plans.record import ArrayPlan, Record

# Items of time or memory below this part of the whole are summed up.
_WORTH_A_LINE = 0.02
# Runners-up named where nobody asked for a certain one.
_SHOWN = 5


def explain(plan: Record, subject: str | None = None) -> str:
    """Return why `plan` is as it is: as a whole, or a mesh axis, dimension or parameter of it.

    Raises UserError if `subject` is none of these.
    """
    if subject is None:
        return _whole(plan)
    name, _, size = subject.partition("=")
    if name in plan.mesh:
        return _axis(plan, name, size)
    if subject in plan.dims:
        return _dimension(plan, subject)
    path = subject if subject in plan.params else _ending(subject, plan.params)
    if path is not None:
        return _parameter(plan, path)
    known = [*plan.mesh, *plan.dims, *plan.params, *(path.split("/")[-1] for path in plan.params)]
    raise UserError(f"{subject!r} is no axis, dimension or parameter of the plan; {nearest(subject, known)}")


def _whole(plan: Record) -> str:
    lines = [f"{plan.topology}: {layout_in_words(plan.mesh, plan.remat, plan.microbatches, plan.saved)}"]
    if plan.estimate is not None:
        estimate = plan.estimate
        lines.append(
            f"a step takes {seconds(estimate.step_seconds)} at {estimate.mfu:.1%} of the peak: "
            + _items(estimate.time, seconds)
        )
        lines.append(f"a device holds {gib(estimate.peak_bytes)} at most: {_items(estimate.memory, gib)}")
        if estimate.heap_bytes is not None:
            lines.append(f"laid out with free places between, that needs {gib(estimate.heap_bytes)} of it")
    lines += proved.of_plan(plan)
    lines += [f"not {_name(other)}: {other.lost}" for other in distinct(plan.alternatives)[:_SHOWN]]
    return "\n".join([*lines, *plan.notes])


def _items(table: Mapping[str, float], write) -> str:
    total = sum(table.values())
    large = {name: size for name, size in table.items() if size >= _WORTH_A_LINE * total}
    shown = sorted(large.items(), key=lambda row: -row[1])
    rest = total - sum(large.values())
    parts = [f"{name} {write(size)}" for name, size in shown]
    return ", ".join([*parts, f"the rest {write(rest)}"] if rest > 0 else parts)


def _axis(plan: Record, axis: str, size: str) -> str:
    if not size:
        return "\n".join([_work_of(plan, axis), *proved.of_axis(plan, axis), *_other_sizes(plan, axis)])
    if not size.isdigit():
        raise UserError(f"{axis}={size} is no axis size; write for example {axis}={plan.mesh[axis] * 2}")
    if plan.mesh[axis] == int(size):
        return "\n".join([_work_of(plan, axis), *proved.of_axis(plan, axis)])
    return _not_this_size(plan, axis, int(size))


def _work_of(plan: Record, axis: str) -> str:
    size = plan.mesh[axis]
    if size == 1:
        return f"{axis}=1: nothing is sharded over {axis}"
    dims = [name for name, dim in plan.dims.items() if axis in dim.axes]
    stored = [row for row in plan.params.values() if axis in _spec_axes(row)]
    share = sum(_elements(row) for row in stored) / max(sum(map(_elements, plan.params.values())), 1)
    lines = [f"{axis}={size}"]
    if dims:
        lines.append(f"shards {', '.join(dims)} while computing")
    if stored:
        lines.append(f"stores {share:.1%} of the parameters in {size} parts")
    if plan.estimate is not None:
        costs = {name: cost for name, cost in plan.estimate.time.items() if name.endswith(f"/{axis}")}
        if costs:
            lines.append(f"costs {_items(costs, seconds)} of {seconds(plan.estimate.step_seconds)}")
    return f"{lines[0]}: " + "; ".join(lines[1:])


def _other_sizes(plan: Record, axis: str) -> list[str]:
    sizes = sorted({row.mesh[axis] for row in plan.alternatives if axis in row.mesh} - {plan.mesh[axis]})
    return [_not_this_size(plan, axis, size) for size in sizes]


def _not_this_size(plan: Record, axis: str, size: int) -> str:
    found = [row for row in plan.alternatives if row.mesh.get(axis, 1) == size]
    if found:
        best = min(found, key=lambda row: (not row.fits, row.estimate.step_seconds))
        took = f"{seconds(best.estimate.step_seconds)}, {gib(best.estimate.peak_bytes)}"
        return f"not {axis}={size}: at its best ({_name(best)}; {took}) it {_as_verb(best.lost)}"
    for written, reason in plan.refused.items():
        if f"{axis}={size}" in written.split(" x "):
            return f"not {axis}={size}: {reason}"
    devices = math.prod(plan.mesh.values())
    if devices % size:
        return f"not {axis}={size}: it does not divide {devices} devices"
    if not plan.alternatives:
        return f"not {axis}={size}: the plan was declared with {axis}={plan.mesh[axis]}"
    return f"not {axis}={size}: the declared parts of the plan leave no room for it"


def _as_verb(lost: str) -> str:
    return lost if lost.startswith(("takes", "stores", "does")) else f"is {lost}"


def _name(row: Alternative) -> str:
    return f"{layout_in_words(row.mesh, row.remat, row.microbatches, row.saved)}, {row.storage}"


def _dimension(plan: Record, name: str) -> str:
    dim = plan.dims[name]
    where = [path for path, row in plan.params.items() if dim.argument == 0 and path == dim.path]
    of = f" (in {where[0]}, for one)" if where else ""
    if dim.axes:
        written = " x ".join(f"{axis}={plan.mesh[axis]}" for axis in dim.axes)
        parts = math.prod(plan.mesh[axis] for axis in dim.axes)
        return (
            f"{name}={dim.size}{of} is sharded over {written} while computing: {dim.size // parts} a device"
        )
    others = [n for n, row in plan.dims.items() if "tensor" in row.axes]
    if plan.mesh.get("tensor", 1) > 1 and others:
        return f"{name}={dim.size}{of} is whole while computing; tensor shards {', '.join(others)} instead"
    return f"{name}={dim.size}{of} is whole while computing"


def _parameter(plan: Record, path: str) -> str:
    row = plan.params[path]
    axes = _spec_axes(row)
    parts = math.prod(plan.mesh[axis] for axis in axes)
    computing = {axis for dim in plan.dims.values() for axis in dim.axes if "tensor" in dim.axes}
    lines = [f"{path} {list(row.shape)} {row.dtype} is stored as {_written(row)}: {_bytes(row, parts)}"]
    for n, entry in enumerate(row.spec):
        for axis in axes_of(entry):
            use = (
                f"is computed with in {plan.mesh[axis]} parts over {axis}"
                if axis in computing
                else f"is stored in {plan.mesh[axis]} parts over {axis} and gathered where it is used"
            )
            lines.append(f"dimension {n} of size {row.shape[n]} {use}")
    if not axes:
        lines.append("every device holds all of it")
    if path in plan.moments:
        lines.append(f"its gradient and moments are stored as {plan.moments[path]}")
    return "\n".join(["; ".join(lines), *proved.of_parameter(plan, path)])


def _written(row: ArrayPlan) -> str:
    entries = [*row.spec, *(None,) * (len(row.shape) - len(row.spec))]
    return "[" + ", ".join("x".join(axes_of(entry)) or "-" for entry in entries) + "]"


def _bytes(row: ArrayPlan, parts: int) -> str:
    import jax.numpy as jnp

    total = _elements(row) * jnp.dtype(row.dtype).itemsize
    return f"{gib(total / parts)} a device of {gib(total)}"


def _spec_axes(row: ArrayPlan) -> list[str]:
    return [axis for entry in row.spec for axis in axes_of(entry)]


def _elements(row: ArrayPlan) -> int:
    return math.prod(row.shape)


def _ending(subject: str, paths: Iterable[str]) -> str | None:
    """Return the parameter whose path ends with `subject`, if there is but one."""
    found = [path for path in paths if by_suffix(path, {subject: None}) is not None]
    return found[0] if len(found) == 1 else None
