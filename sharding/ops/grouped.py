"""Rows that belong to groups, sorted and padded to tiles, for products of each with the matrix of its group.

Both orders of the rows, before and after sorting, are kept as indices, so that no pass scatters floats: the
gradient of a gather is a gather (`pick`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# What multiplies where no kernel of a library does: a loop over tiles, in plain XLA.
TILES = "tiles"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouping:
    """How rows of groups lie, and what multiplies them.

    kernel: `TILES`, or one of ``products.toml``.
    tile: groups begin at multiples of so many rows.
    even: rows of a router without favourites, padding included; what reads a compiled program, in which only
        a run knows how many there are, counts so many.
    interpret: a kernel runs on a CPU, step by step.
    """

    kernel: str
    tile: int
    even: int
    interpret: bool = False


# Rows of a tile that fill matrix units; and how many tiles a group has at least, of those and of larger ones.
# The last one is half empty: larger tiles only save what is read and started for each of them.
_FULL, _TILES_OF_FULL, _TILES_OF_LARGER = 512, 4, 16


def tile_of(rows: int, groups: int, least: int = 8, most: int = 4096) -> int:
    """Return the rows of a tile, such that padding `rows` in `groups` to tiles adds at most about a quarter.

    Above 512 it adds at most about a sixteenth. `least` and `most` are powers of two: enough for the matrix
    unit, and few beside the rows of a group.

    >>> tile_of(32768, 8), tile_of(256, 8), tile_of(131072, 2)
    (512, 16, 4096)
    """
    even = max(1, rows // max(groups, 1))
    tile = least
    while tile < most and (_TILES_OF_FULL if tile < _FULL else _TILES_OF_LARGER) * tile <= even:
        tile *= 2
    return tile


_ROWS_OF_A_TILE = 8


@jax.custom_vjp
def pick(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """Return rows of `x` ``[rows, width]`` at `index` ``[…]``, zeros where that is ``len(x)``.

    `back` ``[rows, m]`` names the places of `index`, flat, that took each row, their number where there is
    none: the gradient sums them in float32, in this order.
    """
    del back
    return x.at[index].get(mode="fill", fill_value=0)


def _pick_forward(x: jax.Array, index: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pick(x, index, back), back


def _pick_backward(back: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return _added(gradient.reshape(-1, gradient.shape[-1]), back), None, None


pick.defvjp(_pick_forward, _pick_backward)


@jax.custom_vjp
def collect(rows: jax.Array, places: jax.Array, of: jax.Array) -> jax.Array:
    """Return sums of `rows` ``[rows, width]`` at `places` ``[n, m]``, as ``[n, width]``, taken in float32.

    A place of ``len(rows)`` adds nothing. `of` ``[rows]`` says which sum each row is in, n where in none: the
    gradient takes it from there.
    """
    del of
    return _added(rows, places)


def _added(rows: jax.Array, places: jax.Array) -> jax.Array:
    """Return the sums of `rows` at `places` ``[n, m]``, in float32.

    Few are added one after another: libtpu lays m rows for each of n out in tiles of eight, which are mostly
    empty then, and took five times as long for two.
    """
    if places.shape[1] < _ROWS_OF_A_TILE:
        each = (rows.at[places[:, n]].get(mode="fill", fill_value=0) for n in range(places.shape[1]))
        return sum((one.astype(jnp.float32) for one in each), start=jnp.float32(0)).astype(rows.dtype)
    taken = rows.at[places].get(mode="fill", fill_value=0)
    return taken.astype(jnp.float32).sum(1).astype(rows.dtype)


def _collect_forward(rows: jax.Array, places: jax.Array, of: jax.Array) -> tuple[jax.Array, jax.Array]:
    return collect(rows, places, of), of


def _collect_backward(of: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient.at[of].get(mode="fill", fill_value=0), None, None


collect.defvjp(_collect_forward, _collect_backward)


def inverse(places: jax.Array, size: int) -> jax.Array:
    """Return which of `places` ``[rows]`` is each of ``range(size)``: their number where none is."""
    rows = jnp.arange(places.shape[0], dtype=jnp.int32)
    return jnp.full(size, places.shape[0], jnp.int32).at[places].set(rows, mode="drop")


def ranks(groups: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the rank of each row in its group, first rows first, and the sizes of `count` groups.

    `groups` is int32 ``[rows]``; `count` there means that a row is in no group.
    """
    order = jnp.argsort(groups, stable=True)
    sizes = jnp.zeros(count + 1, jnp.int32).at[groups].add(1)
    starts = jnp.cumsum(sizes) - sizes
    rank = jnp.arange(groups.shape[0], dtype=jnp.int32) - starts[groups[order]]
    return jnp.zeros_like(rank).at[order].set(rank), sizes[:count]


def by_tiles(groups: jax.Array, count: int, tile: int) -> tuple[jax.Array, int, jax.Array]:
    """Give rows of `groups` places such that each of `count` groups begins at a multiple of `tile`.

    Returns the place of each row (beyond the last for a row of no group), how many places there are, and the
    padded sizes of the groups.
    """
    places = (-(-groups.shape[0] // tile) + count) * tile
    rank, sizes = ranks(groups, count)
    padded = -(-sizes // tile) * tile
    starts = jnp.append(jnp.cumsum(padded) - padded, places)
    return jnp.where(groups < count, starts[groups] + rank, places), places, padded
