"""Run a traced program again, equation by equation, with some equations done differently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from ..program import generations

# Given an equation and the values of its inputs: the values of its outputs, or None to run it as it stands.
Visit = Callable[[core.JaxprEqn, list[Any]], Sequence[Any] | None]


def evaluate(program: core.ClosedJaxpr, args: Sequence[Any], visit: Visit) -> list[Any]:
    """Return the outputs of `program` on `args`, asking `visit` about every equation.

    Calls to jitted functions are opened, so that `visit` sees what is in them. Source lines and name
    scopes of the original equations are kept.
    """
    values: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values.update(zip(program.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in program.jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        with generations.context_of(equation):
            outputs = visit(equation, inputs)
            if outputs is None and equation.primitive.name == "jit":
                outputs = evaluate(generations.closed(equation.params["jaxpr"]), inputs, visit)
            if outputs is None:
                outputs = _run(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in program.jaxpr.outvars]


def reevaluated(function: Callable[..., Any], visit: Visit) -> Callable[..., Any]:
    """Return `function` run through `evaluate`: the same signature, the same values."""

    def wrapped(*args: Any) -> Any:
        program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = evaluate(program, jax.tree.leaves(args), visit)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return wrapped


def _run(equation: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return outputs if equation.primitive.multiple_results else [outputs]
