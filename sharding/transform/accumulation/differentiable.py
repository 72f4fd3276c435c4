"""A loss whose gradients are taken beside its value, as one function that JAX can differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ...errors import UserError

Loss = Callable[[Any, Any], Any]


def differentiable(value: Loss, with_gradients: Callable[[Any, Any], tuple[Any, Any]]) -> Loss:
    """Return `value(params, batch)`, whose gradients are those that `with_gradients` gives beside it.

    Aux values have none; those with respect to the batch are refused.
    """

    @jax.custom_vjp
    def function(params: Any, batch: Any) -> Any:
        return value(params, batch)

    def forward(params: Any, batch: Any) -> Any:
        if any(leaf.perturbed for leaf in jax.tree.leaves(batch, is_leaf=_is_primal)):
            raise UserError("accumulate gives gradients with respect to the parameters, not to the batch")
        return with_gradients(*jax.tree.map(lambda leaf: leaf.value, (params, batch), is_leaf=_is_primal))

    def backward(gradients: Any, cotangent: Any) -> Any:
        scale = cotangent[0] if isinstance(cotangent, tuple) else cotangent
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradients), None

    function.defvjp(forward, backward, symbolic_zeros=True)
    return function


def _is_primal(node: Any) -> bool:
    return hasattr(node, "perturbed")
