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

    @jax.custom_vjp
    def function(params: Any, others: tuple[Any, ...]) -> Any:
        return value(params, *others)

    def forward(params: Any, others: tuple[Any, ...]) -> Any:
        if any(leaf.perturbed for leaf in jax.tree.leaves(others, is_leaf=_is_primal)):
            raise UserError("accumulate gives gradients with respect to the parameters, not to the batch")
        params, others = jax.tree.map(lambda leaf: leaf.value, (params, others), is_leaf=_is_primal)
        return with_gradients(params, *others)

    def backward(gradients: Any, cotangent: Any) -> Any:
        scale = cotangent[0] if isinstance(cotangent, tuple) else cotangent
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradients), None

    function.defvjp(forward, backward, symbolic_zeros=True)
    return lambda params, *others: function(params, others)


def _is_primal(node: Any) -> bool:
    return hasattr(node, "perturbed")
