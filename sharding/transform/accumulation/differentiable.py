"""A loss whose gradients are taken beside its value, as one function that JAX can differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ...errors import UserError

Loss = Callable[..., Any]


def differentiable(value: Loss, with_gradients: Callable[..., tuple[Any, Any]]) -> Loss:
    """Return `value(params, batch, …)`, whose gradients are those that `with_gradients` gives beside it.

    Aux values have none; those with respect to anything but the parameters are refused.
    """

    def function(params: Any, *others: Any) -> Any:
        # JAX hands a rule leaves of its own kind, which not every user's tree can be made of.
        leaves, structure = jax.tree.flatten(params)
        rest, of_rest = jax.tree.flatten(others)

        @jax.custom_vjp
        def flat(leaves: list[Any], rest: list[Any]) -> Any:
            return value(structure.unflatten(leaves), *of_rest.unflatten(rest))

        def forward(leaves: list[Any], rest: list[Any]) -> Any:
            if any(leaf.perturbed for leaf in rest):
                raise UserError("accumulate gives gradients with respect to the parameters, not to the batch")
            params = structure.unflatten([leaf.value for leaf in leaves])
            found, gradients = with_gradients(params, *of_rest.unflatten([leaf.value for leaf in rest]))
            return found, structure.flatten_up_to(gradients)

        def backward(gradients: list[Any], cotangent: Any) -> Any:
            scale = cotangent[0] if isinstance(cotangent, tuple) else cotangent
            scaled = [None if leaf is None else leaf * scale.astype(leaf.dtype) for leaf in gradients]
            return scaled, None

        flat.defvjp(forward, backward, symbolic_zeros=True)
        return flat(leaves, rest)

    return function
