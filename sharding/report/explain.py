"""Why a plan is as it is, from what it remembers of the search and what the compiler proved of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from ..errors import UserError, nearest, wrong
from ..hardware.axes import AXES
from ..paths import by_suffix
from ..plans.origin import Alternative, distinct, is_bound
from ..plans.proof import Proof
from ..plans.record import ArrayPlan, Record
from ..plans.trainable import is_trained
from ..plans.vocabulary import OF_STAGES, of_stages, stages_in_words
from ..words import gib, seconds
from .document import spec_in_words, worth_a_line
from .plan import alternative_in_words, bytes_of, cut_of, layout_of, usable_bytes
from .proof import by_kind, costliest, finding_in_words

# Runners-up and findings named where nobody asked for a certain one.
_OTHERS, _FINDINGS = 5, 3


def explain(plan: Record, subject: str | None = None) -> str:
    """Return why `plan` is as it is: as a whole, or a mesh axis, dimension or parameter of it.

    Raises UserError if `subject` is none of these.
    """
    if subject is None:
        return _whole(plan)
    if not isinstance(subject, str):
        raise wrong("subject", subject, "is no name; write for example 'tensor' or 'tensor=8'")
    name, _, size = subject.partition("=")
    if name in plan.mesh:
        return _axis(plan, name, size)
    if name in OF_STAGES:
        return _of_stages(plan, name, size)
    if subject in plan.dims:
        return _dimension(plan, subject)
    path = subject if subject in plan.params else _ending(subject, plan.params)
    if path is not None:
        return _parameter(plan, path)
    state = plan.state or {}
    path = subject if subject in state else _ending(subject, state)
    if path is not None:
        return _stored(plan, path, state[path], "it is read and given anew by each step")
    if name in AXES:
        return _axis(dataclasses.replace(plan, mesh={**plan.mesh, name: 1}), name, size)
    known = [*plan.mesh, *plan.dims, *plan.params, *state, *(path.split("/")[-1] for path in plan.params)]
    words = dict.fromkeys(filter(None, known))
    raise UserError(f"{subject!r} is no axis, dimension or parameter of the plan; {nearest(subject, words)}")


def _whole(plan: Record) -> str:
    lines = [layout_of(plan)]
    if plan.estimate is not None:
        estimate = plan.estimate
        lines += [
            f"a step takes {seconds(estimate.step_seconds)} at {estimate.mfu:.1%} of the peak: "
            + _items(estimate.time, seconds),
            f"a device holds {gib(estimate.peak_bytes)} at most: {_items(estimate.memory, gib)}",
        ]
        if estimate.heap_bytes is not None:
            heap = gib(estimate.heap_bytes)
            lines.append(f"with the gaps that an allocator leaves between arrays it takes {heap}")
    if plan.proof is not None:
        lines += _proved(plan.proof)
    lines += [
        f"not {alternative_in_words(other)}: {other.lost}" for other in distinct(plan.alternatives)[:_OTHERS]
    ]
    return "\n".join([*lines, *plan.notes])


def _items(table: Mapping[str, float], write: Callable[[float], str]) -> str:
    rows = worth_a_line({name: (size,) for name, size in table.items()}, sum(table.values()))
    return ", ".join(f"{name} {write(size or 0.0)}" for name, (size,) in rows)


def _proved(proof: Proof) -> list[str]:
    """Return what the compiler says of the whole of a plan."""
    return [
        f"{proof.made}, a step takes {seconds(proof.step_seconds)}: {_items(proof.time, seconds)}",
        f"{proof.made}, a device holds {gib(proof.peak_bytes)} at most",
        *(f"found: {finding_in_words(row)}" for row in costliest(proof.findings)[:_FINDINGS]),
    ]


def _axis(plan: Record, axis: str, size: str) -> str:
    if size and not size.isdigit():
        raise UserError(f"{axis}={size} is no axis size; write for example {axis}={plan.mesh[axis] * 2}")
    if size and plan.mesh[axis] != int(size):
        return _not_this_size(plan, axis, int(size))
    others = {row.mesh[axis] for row in plan.alternatives if axis in row.mesh} - {plan.mesh[axis]}
    lines = [_not_this_size(plan, axis, other) for other in sorted(others)] if not size else []
    return "\n".join([_work_of(plan, axis), *_compiled_over(plan, axis), *lines])


def _of_stages(plan: Record, name: str, written: str) -> str:
    """Say how stages work, or what another way that is asked about comes to."""
    stages = plan.mesh.get("stage", 1)
    if stages == 1 or plan.schedule is None:
        raise UserError(f"{name} says how pipeline stages work, and the plan has none; ask about stage=2")
    own = getattr(plan, name)
    value = of_stages(name, written) if written else own
    if value == own:
        here = f"stages work in {stages_in_words(*plan.way)}"
        return "\n".join([note for note in plan.notes if note.startswith(here)] or [here])
    rows = [row for row in plan.alternatives if row.schedule is not None and getattr(row, name) == value]
    found = [row for row in rows if row.mesh.get("stage", 1) == stages]
    asked = f"{name}={written}"
    if found:
        return f"not {asked}: {_why_not(found, asked, usable_bytes(plan))}"
    if asked in plan.refused:
        return f"not {asked}: {plan.refused[asked]}"
    return f"not {asked}: the plan does not remember what that would take; plan again with it declared"


def _work_of(plan: Record, axis: str) -> str:
    size = plan.mesh[axis]
    if size == 1:
        return f"{axis}=1: nothing is sharded over {axis}"
    dims = [name for name, dim in plan.dims.items() if axis in dim.axes]
    elements = {path: math.prod(row.shape) for path, row in plan.params.items()}
    stored = [path for path, row in plan.params.items() if any(axis in axes for axes in cut_of(row).axes)]
    parts = []
    if dims:
        parts.append(f"shards {', '.join(dims)} while computing")
    if stored:
        share = sum(elements[path] for path in stored) / max(sum(elements.values()), 1)
        parts.append(f"stores {share:.1%} of the parameters in {size} parts")
    if plan.estimate is not None:
        costs = {name: cost for name, cost in plan.estimate.time.items() if name.endswith(f"/{axis}")}
        if costs:
            parts.append(f"costs {_items(costs, seconds)} of {seconds(plan.estimate.step_seconds)}")
    return f"{axis}={size}: " + "; ".join(parts)


def _compiled_over(plan: Record, axis: str) -> list[str]:
    """Return what runs over a mesh axis in the compiled step; nothing without a proof or of one device."""
    proof = plan.proof
    if proof is None or plan.mesh[axis] == 1:
        return []
    rows = [row for row in proof.collectives if axis in row.axes]
    if not rows:
        return [f"compiled: no collective runs over {axis}"]
    sums = by_kind(rows)
    busy = {name: (one["seconds"],) for name, one in sums.items()}
    told = [
        f"{name} {sums[name]['count']:,.0f} times, {gib(sums[name]['bytes'])} in {seconds(time or 0.0)}"
        if name in sums
        else f"{name} in {seconds(time or 0.0)}"
        for name, (time,) in worth_a_line(busy, sum(one["seconds"] for one in sums.values()))
    ]
    exposed = sum(one["exposed_seconds"] for one in sums.values())
    waits = f"computing waits for {seconds(exposed) if exposed else 'none'} of it"
    return [f"compiled: {', '.join(told)}; {waits}, of a step of {seconds(proof.step_seconds)}"]


def _not_this_size(plan: Record, axis: str, size: int) -> str:
    found = [row for row in plan.alternatives if row.mesh.get(axis, 1) == size]
    if found:
        return f"not {axis}={size}: {_why_not(found, f'{axis}={size}', usable_bytes(plan))}"
    for written, reason in plan.refused.items():
        if f"{axis}={size}" in written.split(" x "):
            return f"not {axis}={size}: {reason}"
    devices = math.prod(plan.mesh.values())
    if devices % size:
        return f"not {axis}={size}: it does not divide {devices} devices"
    if not plan.alternatives:
        declared = f"the plan was declared with {axis}={plan.mesh[axis]} and compared with no other mesh"
        return f"not {axis}={size}: {declared}; plan=auto mesh=null does so"
    return f"not {axis}={size}: the plan does not remember what that would take; plan again with it declared"


def _why_not(rows: Iterable[Alternative], what: str, capacity_bytes: float | None) -> str:
    """Say what the layouts with `what`, a size of an axis, come to: the best of them, or a bound on it."""
    by_time = sorted(rows, key=lambda row: row.estimate.step_seconds)
    fitting = [row for row in by_time if row.fits]
    bounds = [row for row in by_time if is_bound(row)]
    least = bounds[0].estimate if bounds else None
    if fitting:
        costs = f"{_costing(fitting[0])}) it {_as_verb(fitting[0].lost)}"
        if least is None or fitting[0].estimate.step_seconds <= least.step_seconds:
            return f"at its best ({costs}"
        return (
            f"as far as it was worked out ({costs}; no layout with {what} takes less than "
            f"{seconds(least.step_seconds)}"
        )
    if least is None:
        return f"at its smallest ({_costing(by_time[0])}) it {by_time[0].lost}"
    needs = gib(least.needed_bytes) + (f" of a device's {gib(capacity_bytes)}" if capacity_bytes else "")
    return (
        f"it {_as_verb(bounds[0].lost)}; {seconds(least.step_seconds)} is a lower bound on every layout "
        f"with {what}, not an attainable time: the layout that it was computed for "
        f"({alternative_in_words(bounds[0])}) does not fit, it needs {needs}"
    )


def _costing(row: Alternative) -> str:
    return (
        f"{alternative_in_words(row)}; {seconds(row.estimate.step_seconds)}, {gib(row.estimate.peak_bytes)}"
    )


def _as_verb(lost: str) -> str:
    return lost if lost.startswith(("takes", "stores", "does")) else f"is {lost}"


def _dimension(plan: Record, name: str) -> str:
    dim = plan.dims[name]
    where = f" (in {dim.path}, for one)" if dim.argument == 0 and dim.path in plan.params else ""
    if dim.axes:
        written = " x ".join(f"{axis}={plan.mesh[axis]}" for axis in dim.axes)
        part = dim.size // math.prod(plan.mesh[axis] for axis in dim.axes)
        return f"{name}={dim.size}{where} is sharded over {written} while computing: {part} a device"
    others = [other for other, row in plan.dims.items() if "tensor" in row.axes]
    instead = f"; tensor shards {', '.join(others)} instead" if others and plan.mesh["tensor"] > 1 else ""
    return f"{name}={dim.size}{where} is whole while computing{instead}"


def _parameter(plan: Record, path: str) -> str:
    more = []
    if not is_trained(plan, path, plan.params[path]):
        more.append("it is not trained: it has no gradient and no moments")
    if path in plan.moments:
        more.append(f"its gradient and moments are stored as {plan.moments[path]}")
    return _stored(plan, path, plan.params[path], *more)


def _stored(plan: Record, path: str, row: ArrayPlan, *more: str) -> str:
    cut = cut_of(row)
    on_device, whole = bytes_of(plan, row)
    computing = {axis for dim in plan.dims.values() for axis in dim.axes if "tensor" in dim.axes}
    parts = [
        f"{path} {list(row.shape)} {row.dtype} is stored as {spec_in_words(cut.axes)}: "
        f"{gib(on_device)} a device of {gib(whole)}"
    ]
    for n, (size, axes) in enumerate(zip(cut.shape, cut.axes, strict=True)):
        for axis in axes:
            over = f"in {plan.mesh[axis]} parts over {axis}"
            use = (
                "computed with " + over
                if axis in computing
                else f"stored {over} and gathered where it is used"
            )
            parts.append(f"dimension {n} of size {size} is {use}")
    if not any(cut.axes):
        parts.append("every device holds all of it")
    return "\n".join(["; ".join((*parts, *more)), *_found_of(plan, path)])


def _found_of(plan: Record, path: str) -> list[str]:
    """Return what the compiler's findings say of a parameter; nothing if they do not name it."""
    # As JAX writes a leaf's place in a tree: ``params['layers']['up']``.
    keys = "".join(f"['{key}']" for key in path.split("/"))
    rows = () if plan.proof is None else plan.proof.findings
    return [f"found: {finding_in_words(row)}" for row in rows if keys in row.what or path in row.what.split()]


def _ending(subject: str, paths: Iterable[str]) -> str | None:
    """Return the parameter whose path ends with `subject`, if there is but one."""
    found = [path for path in paths if by_suffix(path, {subject: None}) is not None]
    return found[0] if len(found) == 1 else None
