"""The layers of a loss that stages cut, and what they depend on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ...errors import UserError
from ...program.jaxpr import Traced, call_body, context_of, run, scan_parts
from ...program.layers import cuts_beside, is_layer_scan
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
    return any(is_layer_scan(eqn) or _has_layers_inside(eqn) for eqn in jaxpr.eqns)


def _has_layers_inside(eqn: core.JaxprEqn) -> bool:
    return any(_has_layers(inner) for inner in core.jaxprs_in_params(eqn.params))


def layers_of(program: Program, params: int) -> Equation:
    """Return the scan that walks most of what is made of the `params` first arguments alone.

    Raises UserError for a program without one.
    """
    found = _by_size(program, params)
    if not found:
        inside = next((one for one in program.scope.equations if _has_layers_inside(one.eqn)), None)
        if inside is None:
            raise UserError("stages cut layers, in a scan or written out alike, and this loss has none")
        raise UserError(
            f"stages run layers once, and those inside of {inside.primitive} at {inside.where} run again in "
            "each of its turns: nearest is no stage"
        )
    return found[0]


def stacks_of(program: Program, params: int, stages: int, chunks: int) -> list[Equation]:
    """Return the scans that stages cut, as they run: `layers_of`, and those beside it that are long enough.

    Of these each has parameters that nothing else reads together with the batch, and walks nothing that
    others give. Raises UserError for a program without layers.
    """
    most, by_data = layers_of(program, params), dependent(program, range(params, len(program.arguments)))
    found = [most]
    for one in _by_size(program, params):
        if one is most or not cuts_beside(one.eqn.params["length"], stages, chunks):
            continue
        if all(_is_apart(program, one, other, params) for other in found) and not _is_read_besides(
            program, one, params, by_data
        ):
            found.append(one)
    return sorted(found, key=program.scope.equations.index)


def whole_parameters(program: Program, stacks: Sequence[Equation], params: int) -> frozenset[int]:
    """Return the numbers of the parameters that each stage has all of, whatever of the `stacks` it runs.

    They are those of other layers, and what layers read of other parameters: stages run their chunks of other
    microbatches in one tick, and some a chunk that counts for nothing, so that what they give a parameter
    that all have can be summed over them after the last tick alone.
    """
    own = alone(program, params)
    others = [one for one in _by_size(program, params) if one not in stacks]
    atoms = [atom for one in others for atom in _walked(one) if atom in own]
    for one in stacks:
        constants = one.eqn.invars[: scan_parts(one.eqn).num_consts]
        atoms += [atom for atom in constants if not is_number(atom) and atom in own]
        # What is made of parameters alone is made ahead of the stages.
        atoms += [atom for atom in _walked(one) if atom not in own]
    jaxpr, live = program.scope.jaxpr, set(atoms)
    for eqn in reversed(jaxpr.eqns):
        if not live.isdisjoint(eqn.outvars):
            live.update(atom for atom in eqn.invars if not is_number(atom))
    found = {number for number, var in enumerate(jaxpr.invars[:params]) if var in live}
    return frozenset(found).difference(*(stacked_parameters(program, one, params) for one in stacks))


def walking(program: Program, params: int, numbers: Collection[int]) -> Equation:
    """Return the scan over layers that walks parameters of these numbers alone: a part may read fewer."""
    return next(
        one
        for one in _by_size(program, params)
        if (found := stacked_parameters(program, one, params)) and found <= {*numbers}
    )


def _by_size(program: Program, params: int) -> list[Equation]:
    """Return the scans that walk something made of parameters alone, those that walk most of it first."""
    own = alone(program, params)

    def size(one: Equation) -> int:
        if one.primitive != "scan" or not is_layer_scan(one.eqn):
            return 0
        return sum(math.prod(atom.aval.shape) for atom in _walked(one) if atom in own)

    return sorted(filter(size, program.scope.equations), key=size, reverse=True)


def _walked(layers: Equation) -> list[Any]:
    ins = layers.eqn.invars
    return [atom for atom in ins[len(ins) - scan_parts(layers.eqn).num_xs :] if not is_number(atom)]


def _is_apart(program: Program, one: Equation, other: Equation, params: int) -> bool:
    """Whether two scans share no parameter, and neither walks what the other gives."""
    if stacked_parameters(program, one, params) & stacked_parameters(program, other, params):
        return False
    jaxpr = program.scope.jaxpr
    return not any(
        reached(jaxpr, set(a.eqn.outvars)).intersection(_walked(b)) for a, b in ((one, other), (other, one))
    )


def _is_read_besides(program: Program, layers: Equation, params: int, by_data: set[Any]) -> bool:
    """Whether parameters that a scan walks, more than one number of them, meet the batch elsewhere too."""
    own = dependent(program, stacked_parameters(program, layers, params)) & alone(program, params)
    for one in program.scope.equations:
        atoms: list[Any] = [atom for atom in one.eqn.invars if not is_number(atom)]
        if one is layers or not by_data.intersection(atoms):
            continue
        if any(atom in own and math.prod(atom.aval.shape) > 1 for atom in atoms):
            return True
    return False


def alone(program: Program, params: int) -> set[Any]:
    """Return the values that depend on the `params` first arguments and on no other."""
    count = len(program.scope.jaxpr.invars)
    return dependent(program, range(params)) - dependent(program, range(params, count))


def stacked_parameters(program: Program, layers: Equation, params: int) -> frozenset[int]:
    """Return the numbers of the `params` first arguments that layers walk."""
    found = (stored_as(program, atom, params) for atom in _walked(layers))
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
    return reached(jaxpr, {jaxpr.invars[n] for n in arguments})


def behind(program: Program, layers: Sequence[Equation]) -> set[Any]:
    """Return the values of a program's outermost scope that depend on what scans over layers give."""
    return reached(program.scope.jaxpr, {var for one in layers for var in one.eqn.outvars})


def reached(jaxpr: core.Jaxpr, found: set[Any]) -> set[Any]:
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
        found = reached(body.jaxpr, {var for var, one in pairs if one})
        outs = [not is_number(atom) and atom in found for atom in body.jaxpr.outvars]
        grown = [one or (n in carry and outs[n - carry.start]) for n, one in enumerate(given)]
        if grown == given:
            return outs
        given = grown
