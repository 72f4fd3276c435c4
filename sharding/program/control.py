"""The bodies of loops, conditions and calls, and how often a counted loop runs."""

from __future__ import annotations

import dataclasses

from jax.extend import core

from .generations import closed


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhileParts:
    """A `while` equation's two bodies; its inputs are the condition's constants, the body's, the carry."""

    cond: core.ClosedJaxpr
    body: core.ClosedJaxpr
    num_cond_consts: int
    num_body_consts: int


def while_parts(equation: core.JaxprEqn) -> WhileParts:
    """Read a `while` equation."""
    params = equation.params
    return WhileParts(
        cond=closed(params["cond_jaxpr"]),
        body=closed(params["body_jaxpr"]),
        num_cond_consts=params["cond_nconsts"],
        num_body_consts=params["body_nconsts"],
    )


def branches(equation: core.JaxprEqn) -> tuple[core.ClosedJaxpr, ...]:
    """Return the arms of a `cond` equation; its first input is the index, the rest are theirs."""
    return tuple(closed(arm) for arm in equation.params["branches"])


def call_body(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Return what a call (jit, remat, custom derivative) runs on its inputs, or None if it is no call."""
    params = equation.params
    body = params.get("call_jaxpr", params.get("jaxpr"))
    return closed(body) if isinstance(body, (core.Jaxpr, core.ClosedJaxpr)) else None


def counted_trips(equation: core.JaxprEqn) -> int | None:
    """Return how often a `while` runs, if it counts by one from one constant to another; else None."""
    parts = while_parts(equation)
    cond, body = parts.cond.jaxpr, parts.body.jaxpr
    if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != "lt":
        return None
    counter, limit = cond.eqns[0].invars
    places = [n for n, var in enumerate(cond.invars[parts.num_cond_consts :]) if var is counter]
    if not places:
        return None
    place = places[0]
    start = equation.invars[parts.num_cond_consts + parts.num_body_consts + place]
    stop = limit
    if not isinstance(limit, core.Literal):
        bounds = [n for n, var in enumerate(cond.invars) if var is limit]
        if not bounds or bounds[0] >= parts.num_cond_consts:
            return None
        stop = equation.invars[bounds[0]]
    if not isinstance(start, core.Literal) or not isinstance(stop, core.Literal):
        return None
    before, after = body.invars[parts.num_body_consts + place], body.outvars[place]
    by_one = any(
        eqn.primitive.name == "add"
        and eqn.outvars[0] is after
        and eqn.invars[0] is before
        and isinstance(eqn.invars[1], core.Literal)
        and int(eqn.invars[1].val) == 1
        for eqn in body.eqns
    )
    return max(int(stop.val) - int(start.val), 0) if by_one else None
