"""Checkpointed calls run again with other literals, or on arrays that are cast already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ..jaxpr import call_body, context_of, run, run_around
from .keys import LIFTED, Keys


def cast_within(program: core.ClosedJaxpr | None, index: int) -> Any:
    """Return the type that all uses of an argument cast it to, or None."""
    if program is None:
        return None
    variable = program.jaxpr.invars[index]
    found: set[Any] = set()
    for eqn in program.jaxpr.eqns:
        for place in (n for n, atom in enumerate(eqn.invars) if atom is variable):
            if eqn.primitive.name == "convert_element_type":
                found.add(eqn.params["new_dtype"])
            else:
                opened = eqn.primitive.name == "jit" or eqn.primitive.name in LIFTED
                found.add(cast_within(call_body(eqn), place) if opened else None)
    return found.pop() if len(found) == 1 and variable not in program.jaxpr.outvars else None


def run_given(eqn: core.JaxprEqn, literals: Sequence[Any], inputs: Sequence[Any]) -> Sequence[Any]:
    """Run a checkpoint on `inputs`, some of which are cast already, with `literals` in place of its own."""
    body = call_body(eqn)
    assert body is not None
    count = len(inputs)
    return run_around(
        eqn,
        [*inputs, *literals],
        lambda given: _scope(body, iter(given[count:]), given[:count], Keys()),
    )


def _scope(program: core.ClosedJaxpr, literals: Iterator[Any], args: Sequence[Any], keys: Keys) -> list[Any]:
    """Run a program, taking literals in the order that `Keys` meets them."""
    env: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return next(literals) if isinstance(atom, core.Literal) else env[atom]

    for eqn in program.jaxpr.eqns:
        lifted = eqn.primitive.name in LIFTED or eqn.primitive.name == "jit"
        own = [next(literals) for _ in keys.equation(eqn, True).literals]
        inputs = [read(atom) for atom in eqn.invars]
        with context_of(eqn):
            outs: Sequence[Any]
            if eqn.primitive.name == "convert_element_type":
                outs = [jax.lax.convert_element_type(inputs[0], eqn.params["new_dtype"])]
            elif lifted and (own or _cast(eqn, inputs)):
                outs = run_given(eqn, own, inputs)
            else:
                outs = run(eqn, inputs)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in program.jaxpr.outvars]


def _cast(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> bool:
    rows = zip(inputs, eqn.invars, strict=True)
    return any(jnp.result_type(value) != atom.aval.dtype for value, atom in rows)  # type: ignore[attr-defined]
