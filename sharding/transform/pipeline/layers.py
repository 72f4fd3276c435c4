"""The layers of a loss that stages cut, and what they depend on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ...errors import UserError
from ...program.jaxpr import Traced, call_body, context_of, run, scan_parts
from ...program.layers import is_layer_scan
from ...program.primitives import Trait, primitives
from ...program.program import Equation, Program

_CALLS = ("jit", "closed_call")
_CHECKPOINTS, _RUNS = primitives(Trait.CHECKPOINT), primitives(Trait.CALL)


def inlined(traced: Traced, but: Callable[[core.JaxprEqn], bool] = lambda eqn: False) -> Traced:
    """Return a trace with what jitted functions do in their place, `but` for some calls.

    So are checkpoints around layers: stages run their layers again as it is. Layers that are walked from the
    last on are turned round.
    """

    def is_gone_into(eqn: core.JaxprEqn) -> bool:
        if eqn.primitive.name in _CHECKPOINTS:
            body = call_body(eqn)
            return body is not None and _has_layers(body.jaxpr)
        return eqn.primitive.name in _CALLS and not but(eqn)

    def again(closed: core.ClosedJaxpr, *inputs: Any) -> list[Any]:
        jaxpr = closed.jaxpr
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))

        def value(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            ins = [value(atom) for atom in eqn.invars]
            body = call_body(eqn) if is_gone_into(eqn) else None
            with context_of(eqn):
                if eqn.primitive.name == "scan" and eqn.params["reverse"] and is_layer_scan(eqn):
                    outs = _run_forward(eqn, ins)
                else:
                    outs = run(eqn, ins) if body is None else again(body, *ins)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    shapes = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
        for aval in traced.jaxpr.in_avals
    ]
    jaxpr = jax.make_jaxpr(lambda *args: again(traced.jaxpr, *args))(*shapes)
    return dataclasses.replace(traced, jaxpr=jaxpr, written=traced.written or traced.jaxpr)


def _run_forward(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any]:
    """Run a scan that walks from the end as one from the beginning, over what is turned round."""
    parts = scan_parts(eqn)
    first = parts.num_consts + parts.num_carry
    turned = [lax.rev(jnp.asarray(one), (0,)) for one in ins[first:]]
    outs = run(eqn.replace(params={**eqn.params, "reverse": False}), [*ins[:first], *turned])
    return [*outs[: parts.num_carry], *(lax.rev(one, (0,)) for one in outs[parts.num_carry :])]


def _has_layers(jaxpr: core.Jaxpr) -> bool:
    return any(
        is_layer_scan(eqn) or any(_has_layers(inner) for inner in core.jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )


def layers_of(program: Program, params: int) -> Equation:
    """Return the scan that walks most of what is made of the `params` first arguments alone.

    Raises UserError for a program without one.
    """
    own = alone(program, params)

    def size(one: Equation) -> int:
        if one.primitive != "scan" or not is_layer_scan(one.eqn):
            return 0
        ins = one.eqn.invars
        xs: list[Any] = [atom for atom in ins[len(ins) - scan_parts(one.eqn).num_xs :] if not is_number(atom)]
        return sum(math.prod(atom.aval.shape) for atom in xs if atom in own)

    best = max(program.scope.equations, key=size, default=None)
    if best is None or not size(best):
        raise UserError("stages cut layers, in a scan or written out alike, and this loss has none")
    return best


def alone(program: Program, params: int) -> set[Any]:
    """Return the values that depend on the `params` first arguments and on no other."""
    count = len(program.scope.jaxpr.invars)
    return dependent(program, range(params)) - dependent(program, range(params, count))


def stacked_parameters(program: Program, layers: Equation, params: int) -> frozenset[int]:
    """Return the numbers of the `params` first arguments that layers walk."""
    walked = layers.eqn.invars[-scan_parts(layers.eqn).num_xs :]
    found = (stored_as(program, atom, params) for atom in walked)
    return frozenset(number for number in found if number is not None)


def stored_as(program: Program, atom: Any, params: int) -> int | None:
    """Return the parameter that an atom is, but for a cast or a transposition behind the layers."""
    makers = {var: one.eqn for one in program.scope.equations for var in one.eqn.outvars}
    while not is_number(atom) and atom in makers:
        eqn = makers[atom]
        name = eqn.primitive.name
        if name == "transpose" and eqn.params["permutation"][0] != 0:
            return None
        if name not in ("convert_element_type", "transpose", "name", "copy"):
            return None
        atom = eqn.invars[0]
    return next((n for n in range(params) if program.scope.jaxpr.invars[n] is atom), None)


def is_number(atom: Any) -> bool:
    """Whether a value is written in the program."""
    return isinstance(atom, core.Literal)


def dependent(program: Program, arguments: Iterable[int]) -> set[Any]:
    """Return the values of a program's outermost scope that depend on some of its arguments."""
    jaxpr = program.scope.jaxpr
    return _reached(jaxpr, {jaxpr.invars[n] for n in arguments})


def _reached(jaxpr: core.Jaxpr, found: set[Any]) -> set[Any]:
    """Return the values of a program that depend on some of its values, through what loops and calls do."""
    for eqn in jaxpr.eqns:
        given = [not is_number(atom) and atom in found for atom in eqn.invars]
        if not any(given):
            continue
        found.update(var for var, one in zip(eqn.outvars, _results(eqn, given), strict=True) if one)
    return found


def _results(eqn: core.JaxprEqn, given: list[bool]) -> list[bool]:
    """Return which results of an equation depend on those of its operands that are `given`."""
    body = call_body(eqn) if eqn.primitive.name == "scan" or eqn.primitive.name in _RUNS else None
    if body is None or len(body.jaxpr.invars) != len(given):
        return [True] * len(eqn.outvars)
    carry = range(0)
    if eqn.primitive.name == "scan":
        parts = scan_parts(eqn)
        carry = range(parts.num_consts, parts.num_consts + parts.num_carry)
    while True:
        pairs = zip(body.jaxpr.invars, given, strict=True)
        found = _reached(body.jaxpr, {var for var, one in pairs if one})
        outs = [not is_number(atom) and atom in found for atom in body.jaxpr.outvars]
        grown = [one or (n in carry and outs[n - carry.start]) for n, one in enumerate(given)]
        if grown == given:
            return outs
        given = grown
