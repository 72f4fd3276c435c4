"""Run a traced program again, equation by equation, with some equations done differently."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src import source_info_util  # seen in 0.10.2 and 0.12.0
from jax.extend import core

from . import jaxpr as generations

# Given an equation and the values of its inputs: the values of its outputs, or None to run it as it stands.
Visit = Callable[[core.JaxprEqn, list[Any]], Sequence[Any] | None]
# Given the inputs of a loop's body, the body's outputs.
Body = Callable[[list[Any]], Sequence[Any]]


def evaluate(program: core.ClosedJaxpr, args: Sequence[Any], visit: Visit) -> list[Any]:
    """Return the outputs of `program` on `args`, asking `visit` about every equation.

    Source lines, name scopes and settings of the original equations are kept. Equations that hold other
    programs (a scan, a jitted call) count as one: `visit` decides whether to go into them.
    """
    values: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values.update(zip(program.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in program.jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        with generations.context_of(equation):
            outputs = visit(equation, inputs)
            if outputs is None:
                outputs = run(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in program.jaxpr.outvars]


def run(equation: core.JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Run one equation as it stands."""
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return outputs if equation.primitive.multiple_results else [outputs]


def scan_again(
    equation: core.JaxprEqn,
    inputs: Sequence[Any],
    body: Body,
    *,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Sequence[Any]:
    """Run a `scan` equation with another body, `body(consts + carry + slices) -> carry + rows`.

    `wrap` is laid around the function of (carry, slices) that `jax.lax.scan` is given.
    """
    parts = generations.scan_parts(equation)
    consts = list(inputs[: parts.num_consts])
    carry = list(inputs[parts.num_consts : parts.num_consts + parts.num_carry])
    stacked = list(inputs[parts.num_consts + parts.num_carry :])

    def turn(carry: Any, slices: Any) -> Any:
        outputs = body([*consts, *carry, *slices])
        return list(outputs[: parts.num_carry]), list(outputs[parts.num_carry :])

    carry, rows = jax.lax.scan(
        wrap(turn),
        carry,
        stacked,
        length=equation.params["length"],
        reverse=equation.params["reverse"],
        unroll=equation.params["unroll"],
    )
    return [*carry, *rows]


def checkpoint_again(equation: core.JaxprEqn, inputs: Sequence[Any], body: Body) -> Sequence[Any]:
    """Run a `jax.checkpoint` equation with another body, under the same policy."""
    params = equation.params
    again = jax.checkpoint(
        lambda *args: list(body(list(args))), policy=params["policy"], prevent_cse=params["prevent_cse"]
    )
    return again(*inputs)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanParts:
    """A `scan` equation's body and how its inputs divide: constants, then carry, then stacked arrays."""

    body: core.ClosedJaxpr
    num_consts: int
    num_carry: int
    num_xs: int


def scan_parts(equation: core.JaxprEqn) -> ScanParts:
    """Read a `scan` equation: 0.10 counts its inputs, 0.12 keeps them as flat trees."""
    params = equation.params
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:
        consts, carry = (len(part) for part in params["ft_in"].unpack()[:2])
    return ScanParts(
        body=closed(params["jaxpr"]),
        num_consts=consts,
        num_carry=carry,
        num_xs=len(equation.invars) - consts - carry,
    )


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """Return `jaxpr` with its constants: 0.12 keeps jaxprs in equations open when they have none."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


@contextlib.contextmanager
def context_of(equation: core.JaxprEqn) -> Iterator[None]:
    """Within it, new equations carry the source line, name scope and settings of `equation`."""
    info = equation.source_info
    scope = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=scope), equation.ctx.manager:
        yield
