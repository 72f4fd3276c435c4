"""Deviation of a planned loss and its gradients from the plain function, and what of it rounding explains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..paths import by_path, map_by_path
from ..plans import arrays
from ..plans.record import Decision
from ..plans.trainable import split
from ..plans.vocabulary import BY_PART
from ..program.program import Program
from ..program.tracing import read
from .compose import PlannedLoss, with_gradients
from .metrics import norm
from .said import OF_LOSS, check_given
from .step import with_aux

# A gradient is compared with its own norm, or with this share of the norm of all: what cancels in one of them
# leaves rounding, as large as that of the sums that cancelled.
_SMALLEST_SHARE = 1 / 64
# By how many roundings of the narrowest type two orders of the same sums may differ. A sum of many in a wide
# type gathers some; one that is rounded to a narrow type has that rounding and little else.
_WIDE_ROUNDINGS, _NARROW_ROUNDINGS = 64, 2
# What the rows in another order change by more than this is not rounding: their order means something.
MOST_ROUNDING = 0.05
# By how many times the plain function's own error in narrow types that of the planned one may be larger.
_NARROW_ERRORS = 2

# The share of what rounding may do by which errors that happen to cancel in the plain function may not.
_CHANCE = 1 / 16

# A loss, and the gradients of the trained parameters by their paths.
Result = tuple[Any, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviation:
    """A planned loss beside the plain function, on the same arrays.

    Attributes:
        loss: what the planned function gave.
        expected: what the plain function gave, or the same in wider types where these are the measure.
        apart: relative difference of each trained parameter's gradient by its path, and of the loss at None.
        allowed: what rounding may make of each.
        own: what the plain function gave in the types that were tried, where wider ones are the measure.
        routed: where the plain function in those types chooses other experts than in the wide ones: for how
            many tokens of a layer, and of how many; None without experts.
        plain: the plain function's result, by which that of narrower types can be measured.
    """

    loss: float
    expected: float
    apart: Mapping[str | None, float]
    allowed: Mapping[str | None, float]
    own: float | None = None
    routed: tuple[int, int] | None = None
    plain: Result | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def worst(self) -> list[str | None]:
        """The paths, and None for the loss, from what is furthest beyond what is allowed."""
        # What is no number is beyond everything.
        shares = {
            path: math.inf if math.isnan(apart) else apart / self.allowed[path]
            for path, apart in self.apart.items()
        }
        return sorted(shares, key=lambda path: -shares[path])

    @property
    def passes(self) -> bool:
        """Whether rounding explains every difference."""
        return all(apart <= self.allowed[path] for path, apart in self.apart.items())


def deviation(
    plan: Decision,
    loss: Callable[..., Any],
    params: Any,
    batch: Any,
    *state: Any,
    mesh: Mesh,
    measure: Result | None = None,
) -> Deviation:
    """Return how far `loss` as planned on `mesh` is from the plain function on its first device.

    Both are held to `measure`, a plain result in wider types, where one is given: the planned one may be
    twice as far from it as the plain one is. Else they may differ by the rounding of the loss's types, or by
    four times what the rows in another order change.
    """
    check_given((params, batch, *state), OF_LOSS)
    first = mesh.devices.flat[0]
    arguments = jax.device_put((params, batch, *state), first)
    planned = PlannedLoss(plan, loss, mesh)
    program = read(planned.traces.on(params, batch, *state))
    function = plain_gradients(plan, loss)
    plain = function(*arguments)
    lying = (
        arrays.shardings(plan, params, mesh),
        arrays.shardings(plan, batch, mesh, "batch"),
        *(arrays.shardings(plan, one, mesh, "state") for one in state),
    )
    parts = 1 if plan.accumulation == BY_PART else plan.microbatches
    found = gradients(plan, loss, mesh, parts)(*jax.device_put((params, batch, *state), lying))
    found = jax.device_put(found, first)
    expected = plain if measure is None else jax.device_put(measure, first)
    least = tolerance(program)
    if measure is None:
        turned = jax.device_put(_turned(program, batch), first)
        rounding = apart(plain, function(arguments[0], turned, *arguments[2:]))
        allowed = {path: max(least, min(4 * one, MOST_ROUNDING)) for path, one in rounding.items()}
    else:
        own = apart(expected, plain)
        allowed = {path: max(_NARROW_ERRORS * one, _CHANCE * least) for path, one in own.items()}
    return Deviation(
        loss=float(found[0]),
        expected=float(expected[0]),
        apart=apart(expected, found),
        allowed=allowed,
        own=None if measure is None else float(plain[0]),
        plain=plain,
    )


def plain_gradients(plan: Decision, loss: Callable[..., Any]) -> Callable[..., Result]:
    """Return the jitted ``(params, batch, …) -> (loss, {path: gradient})`` of `loss` as it is written."""

    def function(params: Any, batch: Any, *state: Any) -> Result:
        found, slopes = with_gradients(loss, split(params, plan.trainable), batch, *state)
        return with_aux(found)[0], _by_path(slopes)

    return jax.jit(function)


def gradients(
    plan: Decision, loss: Callable[..., Any], mesh: Mesh, microbatches: int
) -> Callable[..., Result]:
    """Return the jitted ``(params, batch, …) -> (loss, {path: gradient})`` of `loss` as planned."""
    planned = PlannedLoss(dataclasses.replace(plan, microbatches=microbatches), loss, mesh)

    def function(params: Any, batch: Any, *state: Any) -> Result:
        found, slopes = planned.value_and_grad(params, batch, *state)
        lying = by_path(arrays.specs_of_moments(plan, params))
        return with_aux(found)[0], {
            path: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, lying[path]))
            for path, leaf in _by_path(slopes).items()
        }

    return jax.jit(function)


def _by_path(slopes: Any) -> dict[str, Any]:
    """Return the gradients of what is trained by their paths."""
    return {
        path: leaf for path, leaf in by_path(slopes, lambda node: node is None).items() if leaf is not None
    }


def _turned(program: Program, batch: Any) -> Any:
    """Return the batch with the rows in another order."""
    leading = {
        one.path
        for one in program.arguments
        if one.position == 1 and one.dims and one.dims[0] == program.batch_dims
    }
    return map_by_path(lambda path, leaf: jnp.asarray(leaf)[::-1] if path in leading else leaf, batch)


@jax.jit
def norms(result: Result) -> Result:
    """Return the size of the loss, and the norm of each gradient."""
    return jnp.abs(result[0]), {path: norm(leaf) for path, leaf in result[1].items()}


@jax.jit
def _between(one: Result, other: Result) -> Result:
    def less(one: Any, other: Any) -> Any:
        wide = jnp.promote_types(one.dtype, jnp.float32)
        return one.astype(wide) - other.astype(wide)

    return norms(jax.tree.map(less, one, other))


def apart(expected: Result, found: Result) -> dict[str | None, float]:
    """Return by how much of itself each gradient differs, by its path, and the loss, at None."""
    (value, lengths), (change, changes) = jax.device_get((norms(expected), _between(expected, found)))
    least = _SMALLEST_SHARE * math.sqrt(sum(float(length) ** 2 for length in lengths.values()))
    tiny = float(np.finfo(np.float32).tiny)
    differences: dict[str | None, float] = {None: float(change) / max(float(value), tiny)}
    for path, length in lengths.items():
        differences[path] = float(changes[path]) / max(float(length), least, tiny)
    return differences


def tolerance(program: Program) -> float:
    """Return what two orders of the same sums may differ by in the types of `program`."""
    types = (
        getattr(variable.aval, "dtype", None)
        for equation in program.equations()
        for variable in equation.eqn.outvars
    )
    kinds = {kind for kind in types if kind is not None and jnp.issubdtype(kind, jnp.inexact)}
    widest_rounding = max((float(jnp.finfo(kind).eps) for kind in kinds), default=0.0)
    narrow = widest_rounding > float(jnp.finfo(jnp.float32).eps)
    return widest_rounding * (_NARROW_ROUNDINGS if narrow else _WIDE_ROUNDINGS)
