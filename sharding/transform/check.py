"""Accumulation tried on real arrays: two parts against the whole, on the fewest rows that can be had."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..errors import UserError
from ..hardware.memory import usable_bytes
from ..paths import map_by_path
from ..plans import arrays
from ..plans.record import Decision, Record
from ..plans.specs import axes_of, cut_into
from ..plans.trainable import is_trained
from ..plans.vocabulary import BY_PART
from ..program.program import Program
from ..program.tracing import read
from ..words import gib, seconds
from .compose import PlannedLoss
from .deviation import MOST_ROUNDING, apart, gradients, norms, tolerance
from .said import OF_LOSS, check_given, lying_elsewhere


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccumulationCheck:
    """What two parts of a batch gave, against the whole of it.

    Attributes:
        rows: of the batch that were worked through; 0 where nothing was tried.
        apart: the largest relative difference between the two, of a parameter's gradient or of the loss.
        where: that parameter's path, or ``loss``.
        rounding: what the rows in another order change the same by.
        seconds: that the check took, compiling included.
        note: why nothing was tried, or a warning; None where all is well.
    """

    rows: int
    apart: float
    where: str
    rounding: float
    seconds: float
    note: str | None = None

    def __str__(self) -> str:
        if not self.rows:
            return f"accumulation was not checked: {self.note}"
        found = (
            f"accumulation was checked on {self.rows} rows in {seconds(self.seconds)}: the gradients of two "
            f"parts are those of the whole to {self.apart:.1g}"
        )
        return found if self.note is None else f"{found}; {self.note}"


def check_accumulation(
    plan: Record, loss: Callable[..., Any], params: Any, batch: Any, *state: Any, mesh: Mesh
) -> AccumulationCheck:
    """Compare the planned loss in two parts with the whole, see `Plan.check_accumulation`."""
    begun = time.perf_counter()
    if plan.accumulation == BY_PART:
        return _skipped("by part it is the mean of what the parts give, not what the whole gives", begun)
    check_given((params, batch, *state), OF_LOSS)
    arrays.check(plan, params, batch, state=state[0] if state else None)
    if lying_elsewhere((batch,), ("batch",), mesh):
        batch = jax.device_put(batch, arrays.shardings(plan, batch, mesh, "batch"))
    program = read(PlannedLoss(plan, loss, mesh).traces.on(params, batch, *state))
    params = jax.device_put(params, arrays.shardings(plan, params, mesh))
    state = tuple(jax.device_put(one, arrays.shardings(plan, one, mesh, "state")) for one in state)
    for some in _numbers_of_rows(plan, program):
        if reason := _too_large(plan, program, some.rows):
            return _skipped(reason, begun)
        small = jax.eval_shape(some, batch)
        try:
            sized = arrays.resized(plan, params, small, *state)
            whole = gradients(sized, loss, mesh, 1)
            # Some losses have their rows written into them, or work on several together.
            jax.eval_shape(whole, params, small, *state)
        except Exception:  # The user's own function may raise anything where its sizes do not agree.
            continue
        placed = arrays.shardings(sized, small, mesh, "batch")
        taken = jax.jit(some, static_argnums=1, out_shardings=placed)
        expected = whole(params, taken(batch, False), *state)
        if not all(map(math.isfinite, jax.tree.leaves(jax.device_get(norms(expected))))):
            return _skipped(f"the loss or a gradient on {some.rows} rows of this batch is not finite", begun)
        parts = gradients(sized, loss, mesh, 2)
        try:
            jax.eval_shape(parts, params, small, *state)
        except UserError as error:
            # So few rows may not come in parts as all of them do, as where they go in groups.
            return _skipped(str(error), begun)
        found = apart(expected, parts(params, taken(batch, False), *state))
        rounding = apart(expected, whole(params, taken(batch, True), *state))
        return _verdict(some.rows, found, rounding, tolerance(program), begun)
    return _skipped(f"its {_rows(program)} rows do not go over the mesh in two parts", begun)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Some:
    """Takes `rows` of the `whole` rows of a batch, all over it; `leading` are the arrays that have them."""

    rows: int
    whole: int
    leading: frozenset[str]

    def __call__(self, batch: Any, reversed: bool = False) -> Any:
        at = np.arange(self.rows) * (self.whole // self.rows)
        at = at[::-1] if reversed else at
        return map_by_path(lambda path, leaf: jnp.asarray(leaf)[at] if path in self.leading else leaf, batch)

    def __hash__(self) -> int:
        return hash((self.rows, self.whole, self.leading))


def _numbers_of_rows(plan: Decision, program: Program) -> Iterator[_Some]:
    """Yield what takes some rows, the fewest first, that the mesh shares out in two parts."""
    leading = frozenset(
        one.path
        for one in program.arguments
        if one.position == 1 and one.dims and one.dims[0] == program.batch_dims
    )
    entries = [next(iter(plan.batch[path].spec), None) for path in leading]
    step = 2 * math.lcm(*(cut_into(axes_of(entry), plan.mesh) for entry in entries))
    whole = _rows(program) if leading else 0
    for rows in range(step, whole + 1, step):
        if whole % rows == 0:
            yield _Some(rows=rows, whole=whole, leading=leading)


def _rows(program: Program) -> int:
    return math.prod(program.dims[dim].size for dim in program.batch_dims)


def _too_large(plan: Record, program: Program, rows: int) -> str | None:
    """Return why the check would not fit beside a run's state; None if it does, or if nothing is known."""
    chip = plan.topology.chip
    if plan.estimate is None or chip.nominal:
        return None
    memory = dict(plan.estimate.memory)
    # Worked through at once: a part of the batch as planned, here all the rows of the check.
    share = rows * plan.microbatches / _rows(program)
    growing = ("saved_activations", "temporaries")
    needed = sum(bytes * max(share, 1.0) if name in growing else bytes for name, bytes in memory.items())
    # Two trees of gradients are compared, beside the one that is being made.
    gradients = sum(
        arrays.item_bytes(row.dtype) * math.prod(row.shape) / _cut(plan, path)
        for path, row in plan.params.items()
        if is_trained(plan, path, row)
    )
    needed += 2 * gradients
    if needed <= usable_bytes(chip):
        return None
    return f"it would need {gib(needed)} of a device's {gib(usable_bytes(chip))}"


def _cut(plan: Decision, path: str) -> int:
    spec = plan.moments.get(path, plan.params[path].spec)
    return cut_into([axis for entry in spec for axis in axes_of(entry)], plan.mesh)


def _verdict(
    rows: int,
    found: dict[str | None, float],
    rounding: dict[str | None, float],
    tolerance: float,
    begun: float,
) -> AccumulationCheck:
    """Return the check, or raise UserError where no rounding explains what was found."""
    allowed = {path: max(tolerance, min(4 * rounding[path], MOST_ROUNDING)) for path in found}
    worst = max(found, key=lambda path: found[path] / allowed[path])
    what = "the loss" if worst is None else f"the gradient of {worst!r}"
    # Not less than: what is no number is beyond everything.
    if not found[worst] <= allowed[worst]:
        raise UserError(
            f"microbatches change the result: on {rows} rows of this batch {what} in two parts differs by "
            f"{found[worst]:.2g} of itself from that of the whole, and other orders of the rows change it by "
            f"{rounding[worst]:.2g}; train with microbatches=1, or report the loss"
        )
    note = None
    if found[worst] > tolerance:
        note = (
            f"warning: {what} differs by {found[worst]:.2g} of itself, as much as rounding does: the rows in "
            f"another order change it by {rounding[worst]:.2g}"
        )
    return AccumulationCheck(
        rows=rows,
        apart=found[worst],
        where="loss" if worst is None else worst,
        rounding=rounding[worst],
        seconds=time.perf_counter() - begun,
        note=note,
    )


def _skipped(reason: str, begun: float) -> AccumulationCheck:
    return AccumulationCheck(
        rows=0, apart=0.0, where="loss", rounding=0.0, seconds=time.perf_counter() - begun, note=reason
    )
