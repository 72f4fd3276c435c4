"""Rematerialisation as a transformation: what each scanned layer keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from ..errors import UserError, nearest
from ..program import generations
from .evaluate import evaluate, reevaluated

# Policy → what jax.checkpoint may save; None saves nothing but the layer's inputs.
POLICIES: dict[str, Any] = {
    "dots": "dots_with_no_batch_dims_saveable",
    "full": None,
}


def remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Return `function` with the body of every layer scan under `jax.checkpoint`.

    `policy` is ``none`` (the function itself), ``dots`` (keep the results of products with parameters)
    or ``full`` (keep only each layer's input). A layer scan is a `lax.scan` over stacked arrays that
    holds a matrix product or a convolution. Raises UserError, when the function is traced, if there is none.
    """
    if policy == "none":
        return function
    if policy not in POLICIES:
        raise UserError(f"remat={policy!r} is not a policy; {nearest(policy, ['none', *POLICIES])}")
    saved = None if POLICIES[policy] is None else getattr(jax.checkpoint_policies, POLICIES[policy])

    def wrapped(*args: Any) -> Any:
        found = []

        def visit(equation: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any] | None:
            if not _is_layer_scan(equation):
                return None
            found.append(equation)
            return _scan_again(equation, inputs, saved)

        result = reevaluated(function, visit)(*args)
        if not found:
            raise UserError(f"remat={policy!r} works on scanned layers and this function has no scan over layers")
        return result

    return wrapped


def _is_layer_scan(equation: core.JaxprEqn) -> bool:
    if equation.primitive.name != "scan" or equation.params["length"] < 2:
        return False
    scan = generations.scan_parts(equation)
    bodies = [inner.primitive.name for inner in scan.body.jaxpr.eqns]
    already = bool(bodies) and all(name in ("remat2", "checkpoint") for name in bodies)
    return scan.num_xs > 0 and not already and _works(scan.body.jaxpr)


def _works(jaxpr: Any) -> bool:
    names = ("dot_general", "conv_general_dilated")
    return any(
        equation.primitive.name in names or any(_works(inner) for inner in core.jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


def _scan_again(equation: core.JaxprEqn, inputs: list[Any], policy: Any) -> Sequence[Any]:
    scan = generations.scan_parts(equation)
    consts = inputs[: scan.num_consts]
    carry = inputs[scan.num_consts : scan.num_consts + scan.num_carry]
    stacked = inputs[scan.num_consts + scan.num_carry :]

    def body(carry: Any, slices: Any) -> Any:
        outputs = evaluate(scan.body, [*consts, *carry, *slices], lambda *_: None)
        return outputs[: scan.num_carry], outputs[scan.num_carry :]

    carry, rows = jax.lax.scan(
        jax.checkpoint(body, policy=policy, prevent_cse=False),
        carry,
        stacked,
        length=equation.params["length"],
        reverse=equation.params["reverse"],
        unroll=equation.params["unroll"],
    )
    return [*carry, *rows]
