"""Arrays of all queries and keys that a call takes, such as a mask or a bias, cut for pairs of blocks.

A device has the rows of its own queries and the numbers of all keys; so do the gradients. A pair of blocks
reads its part, and adds what it learns to that part alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Dimensions of such an array.
_HEADS, _QUERIES = 1, 2


class OfPairs(NamedTuple):
    """What a call has for pairs, each ``[batch, heads, queries, keys]`` or 1; None if it has it not."""

    mask: jax.Array | None = None
    bias: jax.Array | None = None
    factor: jax.Array | None = None

    @property
    def learnt(self) -> tuple[jax.Array, ...]:
        """Those that have gradients."""
        return tuple(x for x in self if x is not None and jnp.issubdtype(x.dtype, jnp.inexact))

    def with_learnt(self, arrays: tuple[Any, ...], others: Callable[[Any], Any] = lambda x: x) -> OfPairs:
        """Return it with `arrays` for those that `learnt` gives, and with what `others` gives of the rest."""
        found = iter(arrays)
        mine = self.learnt
        return OfPairs(*(next(found) if any(x is one for one in mine) else others(x) for x in self))

    def each(self, change: Callable[[jax.Array], jax.Array]) -> OfPairs:
        """Return it with each array changed."""
        return OfPairs(*(None if x is None else change(x) for x in self))

    def rows(self, change: Callable[[jax.Array], jax.Array]) -> OfPairs:
        """Return it with what has queries changed; `change` takes and gives ``[batch, queries, …]``."""

        def changed(x: jax.Array) -> jax.Array:
            return x if x.shape[_QUERIES] == 1 else jnp.moveaxis(change(jnp.moveaxis(x, 2, 1)), 1, 2)

        return self.each(changed)


class PairBlock(NamedTuple):
    """Where a pair of blocks lies in arrays of pairs: its first row and key, and how many of each.

    `heads` are kv heads and the queries' heads that share one.
    """

    row: Any
    key: Any
    rows: int
    keys: int
    heads: tuple[int, int]

    def _lies(self, x: jax.Array) -> tuple[list[Any], list[int]]:
        batch, heads, rows, keys = x.shape
        first = [0, 0, self.row if rows > 1 else 0, self.key if keys > 1 else 0]
        return first, [batch, heads, min(rows, self.rows), min(keys, self.keys)]

    def of(self, x: jax.Array) -> jax.Array:
        """Return the block's part, ``[batch, kv_heads, groups, rows, keys]``, each of them or 1."""
        found = lax.dynamic_slice(x, *self._lies(x))
        heads = self.heads if x.shape[_HEADS] > 1 else (1, 1)
        return found.reshape(found.shape[0], *heads, *found.shape[2:])

    def added(self, sums: jax.Array, more: jax.Array) -> jax.Array:
        """Return `sums` with ``more [batch, kv_heads, groups, rows, keys]`` added to the block's part."""
        more = more.reshape(more.shape[0], -1, *more.shape[3:])
        first, sizes = self._lies(sums)
        over = [d for d, size in enumerate(sizes) if size == 1 and more.shape[d] > 1]
        more = more.sum(over, keepdims=True)
        return lax.dynamic_update_slice(sums, lax.dynamic_slice(sums, first, sizes) + more, first)


def traded(x: jax.Array, axis: str, me: Any, parts: int) -> jax.Array:
    """Return what a device has of its queries and all heads as all queries of its share of heads."""
    _, heads, rows, _ = x.shape
    if rows > 1 and heads > 1:
        return lax.all_to_all(x, axis, split_axis=_HEADS, concat_axis=_QUERIES, tiled=True)
    if rows > 1:
        return lax.all_gather(x, axis, axis=_QUERIES, tiled=True)
    return lax.dynamic_slice_in_dim(x, me * (heads // parts), heads // parts, _HEADS) if heads > 1 else x
