"""Rows that belong to groups: sorted, padded to tiles, and multiplied each by the matrix of its group.

Both orders of the rows, before and after sorting, are kept as indices, so that no pass scatters floats: the
gradient of a gather is a gather (`pick`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Rows of a tile: enough for the matrix unit, and few beside the rows of a group.
_MOST_ROWS = 128
_LEAST_ROWS = 8


def tile_of(rows: int, groups: int) -> int:
    """Return the rows of a tile, such that padding `rows` in `groups` to tiles adds at most about a quarter.

    >>> tile_of(32768, 8), tile_of(256, 8)
    (128, 16)
    """
    even = max(1, rows // max(groups, 1))
    tile = _LEAST_ROWS
    while tile < _MOST_ROWS and 4 * tile <= even:
        tile *= 2
    return tile


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
    flat = gradient.reshape(-1, gradient.shape[-1])
    taken = flat.at[back].get(mode="fill", fill_value=0)
    return taken.astype(jnp.float32).sum(1).astype(flat.dtype), None, None


pick.defvjp(_pick_forward, _pick_backward)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled_product(tile: int, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Return each row of `x` ``[rows, in]`` times the matrix of its group in `w` ``[groups, in, out]``.

    Groups follow each other; their `sizes` ``[groups]`` are multiples of `tile`. A loop over the tiles in
    use, in plain XLA: `lax.ragged_dot` multiplies every row by every matrix on CPUs and GPUs, and for the
    gradient of the matrices on TPUs.
    """
    group, used = _tiles(tile, x, sizes)
    cut = x.reshape(-1, tile, x.shape[1])
    out = jnp.zeros((*cut.shape[:2], w.shape[2]), x.dtype)

    def body(n: jax.Array, out: jax.Array) -> jax.Array:
        product = jnp.dot(cut[n], w[group[n]], preferred_element_type=jnp.float32)
        return out.at[n].set(product.astype(out.dtype))

    return lax.fori_loop(0, used, body, out).reshape(x.shape[0], -1)


def _tiles(tile: int, x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the group of each tile, and how many tiles are in use."""
    ends = jnp.cumsum(sizes)
    firsts = jnp.arange(0, x.shape[0], tile)
    group = jnp.searchsorted(ends, firsts, side="right")
    return jnp.minimum(group, sizes.shape[0] - 1), ends[-1] // tile


def _tiled_backward(
    tile: int, kept: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = kept
    group, used = _tiles(tile, x, sizes)
    x_cut, d_cut = (y.reshape(-1, tile, y.shape[1]) for y in (x, gradient))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def body(n: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Summed in the carry: a scan's own gradient of w[group] adds up all groups in every turn.
        d_x, d_w = sums
        one = group[n]
        d_x = d_x.at[n].set(product("tf,df->td", d_cut[n], w[one]).astype(d_x.dtype))
        return d_x, d_w.at[one].add(product("td,tf->df", x_cut[n], d_cut[n]))

    start = jnp.zeros(x_cut.shape, x.dtype), jnp.zeros(w.shape, jnp.float32)
    d_x, d_w = lax.fori_loop(0, used, body, start)
    return d_x.reshape(x.shape), d_w.astype(w.dtype), None


tiled_product.defvjp(
    lambda tile, x, w, sizes: (tiled_product(tile, x, w, sizes), (x, w, sizes)), _tiled_backward
)
