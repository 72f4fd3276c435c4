"""Masks of splash's kernels that are looked at only where they change.

To know which pairs of blocks of queries and keys a kernel skips, splash reads its mask for each pair: 131,072
tokens in blocks of 1024 are 16,384 masks of a million numbers, several times over. Of a causal mask or a
window all pairs but those at an edge are of one value, which the ends of the blocks say.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


class _Uniform(np.ndarray):
    """A mask of one value, of which one number exists; whether any or all are set is read from that.

    What is computed from it is a plain array.
    """

    def __array_wrap__(self, array: np.ndarray, *_: Any) -> np.ndarray:
        return np.asarray(array)

    def any(self, *args: Any, **kwargs: Any) -> Any:
        return super().any(*args, **kwargs) if args or kwargs else self.flat[0]

    def all(self, *args: Any, **kwargs: Any) -> Any:
        return super().all(*args, **kwargs) if args or kwargs else self.flat[0]


@functools.lru_cache(maxsize=64)
def _uniform(value: bool, shape: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(np.bool_(value), shape).view(_Uniform)


def full_of(shape: tuple[int, int]) -> Any:
    """Return the mask of splash that lets each of `shape[0]` queries see all of `shape[1]` keys."""
    return _classes()[2](shape)


def causal_of(shape: tuple[int, int], before: int, parts: int) -> Any:
    """Return the mask of splash that lets each of `shape[0]` queries see itself and all keys before it.

    Args:
        shape: numbers of queries and of keys.
        before: keys that stand before the first query.
        parts: devices that the queries are spread over.
    """
    return _classes()[0](shape, offset=before, shard_count=parts)


def window_of(shape: tuple[int, int], behind: int | None, ahead: int, before: int, parts: int) -> Any:
    """Return the mask that lets a query see `behind` keys before it, all if None, and `ahead` after it."""
    return _classes()[1](shape, window_size=(behind, ahead), offset=before, shard_count=parts)


@functools.cache
def _classes() -> tuple[Any, Any, Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def ends(mask: Any, rows: slice) -> tuple[int, int, int] | None:
        """Return how many queries `rows` are, and the first and last key that they stand at; None of none.

        It is kept with the mask: splash asks for each row of blocks as often as there are blocks of keys,
        four million times for a million tokens.
        """
        known = mask.__dict__.setdefault("ends_of_rows", {})
        place = (rows.start, rows.stop, rows.step)
        if place not in known:
            seen = mask.q_sequence[rows] + mask.offset
            known[place] = (len(seen), int(seen.min()), int(seen.max())) if len(seen) else None
        return known[place]

    def read(mask: Any, index: tuple[slice, slice], behind: int | None, ahead: int, whole: Any) -> np.ndarray:
        """Return a block of `mask`, by `whole` where it is not of one value."""
        keys = range(mask.shape[1])[index[1]]
        found = ends(mask, index[0])
        if found is None or not keys:
            return whole(index)
        count, first, last = found
        shape = (count, len(keys))
        if keys[0] > last + ahead or (behind is not None and keys[-1] < first - behind):
            return _uniform(False, shape)
        if keys[-1] <= first + ahead and (behind is None or keys[0] >= last - behind):
            return _uniform(True, shape)
        return whole(index)

    class Causal(masks.CausalMask):
        def __getitem__(self, idx: Any) -> np.ndarray:
            return read(self, idx, None, 0, super().__getitem__)

    class Window(masks.LocalMask):
        def __getitem__(self, idx: Any) -> np.ndarray:
            behind, ahead = self.window_size
            # What is not bounded ahead sees all keys.
            ahead = self.shape[0] + self.shape[1] if ahead is None else ahead
            return read(self, idx, behind, ahead, super().__getitem__)

    class Full(masks.FullMask):
        def __getitem__(self, idx: Any) -> np.ndarray:
            rows, keys = (range(size)[one] for size, one in zip(self.shape, idx, strict=True))
            return _uniform(True, (len(rows), len(keys)))

    return Causal, Window, Full
