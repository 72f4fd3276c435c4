"""A loss whose gradients are taken beside its value, as one function that JAX can differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ...errors import UserError

Loss = Callable[..., Any]


def differentiable(
    value: Loss,
    with_gradients: Callable[..., tuple[Any, Any]],
    is_even: Callable[..., bool] = lambda *_: True,
) -> Loss:
    """Return `value(params, batch, …)`, whose gradients are those that `with_gradients` gives beside it.

    Those of aux values, and those with respect to anything but the parameters, are refused. Where the
    gradient of a multiple is not that multiple (of the arguments of a loss that `is_even` denies it), it is
    taken once it is known what comes back, ``with_gradients(…, cotangent=…)``.
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
            given = [leaf.value for leaf in leaves], [leaf.value for leaf in rest]
            args = structure.unflatten(given[0]), *of_rest.unflatten(given[1])
            if not is_even(*args):
                return value(*args), (None, given)
            found, gradients = with_gradients(*args)
            return found, (structure.flatten_up_to(gradients), None)

        def backward(kept: Any, cotangent: Any) -> Any:
            gradients, given = kept
            scale, *of_aux = jax.tree.leaves(cotangent, is_leaf=_is_none)
            if not all(_is_none(one) for one in of_aux):
                raise UserError(
                    "a gradient of what the loss gives beside its number (aux) is asked for, microbatches "
                    "have that of the number alone: add it up in the loss, or use microbatches=1"
                )
            if _is_none(scale):
                return [None] * structure.num_leaves, None
            scale = jnp.asarray(scale)
            if given is not None:
                args = structure.unflatten(given[0]), *of_rest.unflatten(given[1])
                return structure.flatten_up_to(with_gradients(*args, cotangent=scale)[1]), None
            scaled = [None if leaf is None else leaf * scale.astype(leaf.dtype) for leaf in gradients]
            return scaled, None

        flat.defvjp(forward, backward, symbolic_zeros=True)
        return flat(leaves, rest)

    return function


def _is_none(cotangent: Any) -> bool:
    """Whether nothing comes back to a result."""
    return isinstance(cotangent, SymbolicZero) or getattr(cotangent, "dtype", None) == jax.dtypes.float0
