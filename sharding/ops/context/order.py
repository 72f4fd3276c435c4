"""The order of a sequence over devices in which causality gives each as much to do, and the way into it.

    sequence in 2n chunks      as it lies             balanced: device i has i and 2n - 1 - i
    0 1 2 3 4 5 6 7    n = 4   [0 1] [2 3] [4 5] [6 7]    [0 7] [1 6] [2 5] [3 4]

A device's first chunk and its second each go to one device, so that two permutes of halves are all that
moves; the sequence outside keeps its order, and so do positions, segments and what is made of each token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def chunks_of(parts: int, *, balanced: bool) -> np.ndarray:
    """Return the chunks of each device, ``[parts, 2]`` if `balanced`, else ``[parts, 1]``.

    >>> chunks_of(2, balanced=True).tolist(), chunks_of(2, balanced=False).tolist()
    ([[0, 3], [1, 2]], [[0], [1]])
    """
    own = np.arange(parts)
    return np.stack([own, 2 * parts - 1 - own], -1) if balanced else own[:, None]


def into_balance(x: jax.Array, axis: str, parts: int) -> jax.Array:
    """Return a device's rows in balanced order, of those ``[batch, rows, …]`` that follow one another."""
    first, second = jnp.split(x, 2, axis=1)
    even, odd = (
        lax.ppermute(one, axis, ways) for one, ways in zip((first, second), _ways(parts), strict=True)
    )
    swapped = lax.axis_index(axis) % 2 == 1
    # An even device's low chunk is even, an odd one's is odd.
    return jnp.concatenate([jnp.where(swapped, odd, even), jnp.where(swapped, even, odd)], axis=1)


def out_of_balance(x: jax.Array, axis: str, parts: int) -> jax.Array:
    """Return what `into_balance` was given."""
    low, high = jnp.split(x, 2, axis=1)
    swapped = lax.axis_index(axis) % 2 == 1
    halves = jnp.where(swapped, high, low), jnp.where(swapped, low, high)
    back = [[(there, here) for here, there in ways] for ways in _ways(parts)]
    return jnp.concatenate(
        [lax.ppermute(one, axis, ways) for one, ways in zip(halves, back, strict=True)], axis=1
    )


def _ways(parts: int) -> list[list[tuple[int, int]]]:
    """Return from which device to which its first and its second chunk go."""

    def home(chunk: int) -> int:
        return min(chunk, 2 * parts - 1 - chunk)

    return [[(own, home(2 * own + half)) for own in range(parts)] for half in range(2)]


def moved_share(parts: int) -> float:
    """Return the share of a sequence that changes devices on its way into balance.

    >>> moved_share(2), moved_share(8)
    (0.5, 0.875)
    """
    ways: list[Any] = [way for half in _ways(parts) for way in half]
    return sum(here != there for here, there in ways) / len(ways)
