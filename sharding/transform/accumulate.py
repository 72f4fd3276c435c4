"""Gradient accumulation as a transformation: a batch worked through in parts, with the same mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import UserError, nearest_divisors


def accumulate(loss: Callable[[Any, Any], Any], microbatches: int) -> Callable[[Any, Any], Any]:
    """Return `loss` with the batch worked through in `microbatches` parts, one after the other.

    `loss(params, batch)` gives a mean over the batch, or ``(mean, aux)`` with scalar aux values. Parts
    count by ``aux["weight"]`` where the loss gives one (tokens counted, say) and equally otherwise, so the
    result is the mean over the whole batch; ``weight`` itself is summed. When differentiated, each part's
    gradients are taken at once and summed, so that the activations of one part only are ever held.

    Every leaf of `batch` has the batch as its first dimension; rows go to the parts by stride, which keeps
    a sharded batch where it is. Gradients with respect to `batch` are refused; aux values have none.
    """
    if microbatches == 1:
        return loss

    def parts_of(batch: Any) -> Any:
        return jax.tree.map(lambda leaf: _split(leaf, microbatches), batch)

    def scan_parts(one_part: Callable[[Any], Any], batch: Any) -> Any:
        """Sum `one_part`'s weighted results over the parts and divide by the sum of weights."""

        def body(total: Any, part: Any) -> Any:
            weight, values = one_part(part)
            values = jax.tree.map(lambda value: value * weight.astype(value.dtype), values)
            return jax.tree.map(jnp.add, total, (weight, values)), None

        parts = parts_of(batch)
        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), parts)
        zero = jax.tree.map(
            lambda value: jnp.zeros(value.shape, value.dtype), jax.eval_shape(one_part, first)
        )
        (weight, values), _ = jax.lax.scan(body, zero, parts)
        # All rows may be padding: then every value is 0, and stays 0.
        divisor = jnp.where(weight == 0, 1, weight)
        return weight, jax.tree.map(lambda value: value / divisor.astype(value.dtype), values)

    @jax.custom_vjp
    def accumulated(params: Any, batch: Any) -> Any:
        def one_part(part: Any) -> Any:
            result = loss(params, part)
            return _weight(result), result

        weight, result = scan_parts(one_part, batch)
        return _with_weight(result, weight)

    def forward(params: Any, batch: Any) -> Any:
        if any(leaf.perturbed for leaf in jax.tree.leaves(batch, is_leaf=_is_primal)):
            raise UserError("accumulate gives gradients with respect to the parameters, not to the batch")
        params, batch = (
            jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal) for tree in (params, batch)
        )

        def one_part(part: Any) -> Any:
            def with_result(params: Any) -> Any:
                result = loss(params, part)
                return (result[0] if isinstance(result, tuple) else result), result

            gradients, result = jax.grad(with_result, has_aux=True, allow_int=True)(params)
            return _weight(result), (result, _floats(gradients))

        weight, (result, gradients) = scan_parts(one_part, batch)
        return _with_weight(result, weight), (params, batch, gradients)

    def backward(kept: Any, cotangent: Any) -> Any:
        params, batch, gradients = kept
        scale = cotangent[0] if isinstance(cotangent, tuple) else cotangent
        scaled = [None if leaf is None else leaf * scale.astype(leaf.dtype) for leaf in gradients]
        return jax.tree.unflatten(jax.tree.structure(params), scaled), jax.tree.map(lambda _: None, batch)

    accumulated.defvjp(forward, backward, symbolic_zeros=True)
    return accumulated


def _weight(result: Any) -> Any:
    """How much a part counts: ``aux["weight"]``, or 1."""
    aux = result[1] if isinstance(result, tuple) else {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if jnp.ndim(leaf):
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise UserError(f"microbatches need scalar aux values; aux {name!r} has shape {jnp.shape(leaf)}")
    return aux["weight"] if isinstance(aux, dict) and "weight" in aux else jnp.float32(1)


def _with_weight(result: Any, weight: Any) -> Any:
    """Put the sum of the parts' weights where the loss had its own."""
    if isinstance(result, tuple) and isinstance(result[1], dict) and "weight" in result[1]:
        return result[0], {**result[1], "weight": weight}
    return result


def _is_primal(node: Any) -> bool:
    return hasattr(node, "perturbed")


def _floats(gradients: Any) -> list[Any]:
    """Leaves of the gradients, None for parameters of integer type, which have none."""
    return [leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None for leaf in jax.tree.leaves(gradients)]


def _split(leaf: Any, parts: int) -> Any:
    rows = leaf.shape[0] if leaf.ndim else 0
    if rows == 0 or rows % parts:
        near = nearest_divisors(rows, parts)
        raise UserError(f"microbatches={parts} does not divide the batch of {rows} rows; nearest: {near}")
    return jnp.swapaxes(leaf.reshape(rows // parts, parts, *leaf.shape[1:]), 0, 1)
