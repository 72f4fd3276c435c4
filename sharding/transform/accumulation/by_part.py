"""The mean of what the parts of a batch give, each worked through as if it were the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ...errors import UserError, nearest_divisors

# Shapes of keys as JAX's older functions have them: threefry's and rbg's.
_RAW_KEYS = ((2,), (4,))


def mean_of_parts(
    one_part: Callable[[Any], Any], batch: Any, microbatches: int, like: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Return the mean of what `one_part` gives of each part of the batch, one after the other.

    Args:
        one_part: gives, of a part, what a loss gives, and a tree of other arrays, such as its gradients. Loss
            and arrays are means over the part's rows, and aux values scalars. Parts count by
            ``aux["weight"]`` where there is one (tokens counted, say) and equally otherwise, so that the
            result is the mean over the whole batch; ``weight`` itself is summed.
        batch: a tree of arrays ``[rows, ...]``. Rows go to the parts by stride, which keeps a sharded batch
            where it is. Numbers and keys are the same for every part.
        microbatches: parts; they divide the rows.
        like: gives what `one_part` does as ShapeDtypeStructs.

    Raises:
        UserError: the rows do not divide, or an aux value is no scalar.
    """
    leaves, structure = jax.tree.flatten(batch)
    parts = {n: _split(leaf, microbatches) for n, leaf in enumerate(leaves) if _has_rows(leaf)}
    if not parts:
        raise UserError(f"microbatches={microbatches} is of a batch without rows")
    first = [
        jax.ShapeDtypeStruct(parts[n].shape[1:] if n in parts else leaf.shape, leaf.dtype)
        for n, leaf in enumerate(leaves)
    ]
    shapes = like(structure.unflatten(first))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        found = one_part(structure.unflatten([part.get(n, leaf) for n, leaf in enumerate(leaves)]))
        weight = _weight(found[0])
        weighed = jax.tree.map(lambda value: value * weight.astype(value.dtype), found)
        return jax.tree.map(jnp.add, total, (weight, weighed)), None

    zero = jax.tree.map(lambda value: jnp.zeros(value.shape, value.dtype), (_weight(shapes[0]), shapes))
    (weight, sums), _ = jax.lax.scan(add, zero, parts)
    # All rows may be padding: then every value is 0, and stays 0.
    divisor = jnp.where(weight == 0, 1, weight)
    result, others = jax.tree.map(lambda value: value / divisor.astype(value.dtype), sums)
    if isinstance(result, tuple) and isinstance(result[1], dict) and "weight" in result[1]:
        result = result[0], {**result[1], "weight": weight}
    return result, others


def _weight(result: Any) -> Any:
    """How much a part counts: ``aux["weight"]``, or 1."""
    aux = result[1] if isinstance(result, tuple) else {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if getattr(leaf, "ndim", 0):
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise UserError(f"microbatches need scalar aux values; aux {name!r} has shape {leaf.shape}")
    return aux["weight"] if isinstance(aux, dict) and "weight" in aux else jnp.float32(1)


def _has_rows(leaf: Any) -> bool:
    """Whether an array of a batch is more than one number or one key, which every part has."""
    raw_key = leaf.dtype == jnp.uint32 and leaf.shape in _RAW_KEYS
    return leaf.ndim > 0 and not raw_key


def _split(leaf: Any, parts: int) -> Any:
    rows = leaf.shape[0]
    if rows == 0 or rows % parts:
        near = nearest_divisors(rows, parts)
        raise UserError(f"microbatches={parts} does not divide the batch of {rows} rows; nearest: {near}")
    return jnp.swapaxes(leaf.reshape(rows // parts, parts, *leaf.shape[1:]), 0, 1)
