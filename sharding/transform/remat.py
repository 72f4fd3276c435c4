"""Rematerialisation as a transformation: what each scanned layer keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from ..errors import UserError, nearest
from ..program import generations
from ..program.layers import is_checkpointed, is_layer_scan
from .evaluate import evaluate, scan_again

# Policy → which results the backward pass keeps, as `jax.checkpoint` understands it; ``none`` is without one.
POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Return `function` with the body of every layer scan under `jax.checkpoint`.

    `policy` is ``none`` (keep what JAX keeps), ``dots`` (keep the results of products
    with parameters) or ``full`` (keep only each layer's input). A layer scan is a `lax.scan` over stacked
    arrays that holds a matrix product or a convolution; one whose body is under `jax.checkpoint` already is
    left as it is. Raises UserError, when the function is traced, if ``dots`` or ``full`` find none.
    """
    if policy not in POLICIES:
        raise UserError(f"remat={policy!r} is not a policy; {nearest(policy, POLICIES)}")
    if policy == "none":
        return function

    def wrapped(*args: Any) -> Any:
        found = []

        def visit(equation: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any] | None:
            if equation.primitive.name == "jit":
                return evaluate(generations.closed(equation.params["jaxpr"]), inputs, visit)
            if not is_layer_scan(equation):
                return None
            found.append(equation)
            body = generations.scan_parts(equation).body
            if is_checkpointed(body):
                return None
            return scan_again(
                equation,
                inputs,
                lambda args: evaluate(body, args, lambda *_: None),
                wrap=lambda turn: jax.checkpoint(turn, policy=POLICIES[policy], prevent_cse=False),
            )

        program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = evaluate(program, jax.tree.leaves(args), visit)
        if not found:
            raise UserError(
                f"remat={policy!r} works on scanned layers and this function has no scan over layers"
            )
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return wrapped
