"""Run a traced program again, equation by equation, with some equations done differently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from ..program import generations

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
