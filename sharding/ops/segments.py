"""Segments of packed rows as kernels want to be told of them: runs of equal ids, and where they begin.

A run is as many neighbours of a row as have one id; padding is a run like any other, so that there is no
token that a kernel leaves as it lay in memory. Where no id comes back after another, seeing one's own run is
seeing all of the same id, which is what `ops.attention` means by segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ..errors import UserError

# cuDNN's offsets are int32.
_MOST_ELEMENTS = 2**31 - 1


def begins(ids: jax.Array) -> jax.Array:
    """Return whether each token begins a run, bool like `ids` ``[batch, sequence]``."""
    changed = ids[:, 1:] != ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)


def first_keys(ids: jax.Array, window: jax.Array | int | None = None) -> jax.Array:
    """Return the place of the first key that a causal query sees, int32 like `ids` ``[batch, sequence]``.

    >>> import jax.numpy as jnp
    >>> first_keys(jnp.array([[1, 1, 2, 2, 2]]), window=2).tolist()
    [[0, 0, 2, 2, 3]]
    """
    place = jnp.arange(ids.shape[1], dtype=jnp.int32)
    first = lax.cummax(jnp.where(begins(ids), place, 0), axis=1)
    return first if window is None else jnp.maximum(first, place - (window - 1))


def last_keys(ids: jax.Array) -> jax.Array:
    """Return one past the place of the last token of each token's run, int32 like `ids`."""
    size = ids.shape[1]
    place = jnp.arange(size, dtype=jnp.int32)
    starts = jnp.where(begins(ids), place, size)[:, 1:]
    later = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=size)
    return lax.cummin(later, axis=1, reverse=True)


def seeing(
    asks: jax.Array, ids: jax.Array, shown: jax.Array, *, behind: int | None, ahead: int | None
) -> jax.Array:
    """Return which queries, of ids `asks`, see a key of their id that is shown: bool ``[batch, queries]``.

    `ids` and `shown` are ``[batch, keys]``; keys are looked at from `behind` places before a query to `ahead`
    behind it, None for all. Ids may come back after others.

    Queries and keys are sorted by id and place, so that the shown key before a query is the nearest. Nothing
    is looked up by index, which XLA's partitioner ends the process over where sequences are cut.

    >>> import jax.numpy as jnp
    >>> ids, shown = jnp.array([[1, 1, 2, 1]]), jnp.array([[False, True, False, False]])
    >>> seeing(ids, ids, shown, behind=None, ahead=0).tolist()
    [[False, True, False, True]]
    """
    (batch, queries), keys = asks.shape, ids.shape[1]
    asking = jnp.arange(keys + queries, dtype=jnp.int32) >= keys
    place = jnp.concatenate([jnp.arange(keys, dtype=jnp.int32), jnp.arange(queries, dtype=jnp.int32)])
    kind, place = (
        jnp.broadcast_to(one, (batch, keys + queries)) for one in (asking.astype(jnp.int32), place)
    )
    there = jnp.concatenate([shown, jnp.zeros_like(asks, bool)], axis=1)
    number, place, kind, there = lax.sort(
        (jnp.concatenate([ids, asks], axis=1), place, kind, there), dimension=1, num_keys=3
    )

    def near(reverse: bool, most: int | None) -> jax.Array:
        found, its, where = lax.associative_scan(_latest, (there, number, place), reverse=reverse, axis=1)
        there_too = found & (its == number)
        return there_too if most is None else there_too & (jnp.abs(place - where) <= most)

    sees = near(False, behind)
    if ahead != 0:
        sees |= near(True, ahead)
    return lax.sort((kind, place, sees), dimension=1, num_keys=2)[2][:, keys:]


def _latest(before: Sequence[jax.Array], here: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Return what is here, else what was before; the first of each says whether there is anything."""
    there = here[0]
    return (before[0] | there, *(jnp.where(there, *both) for both in zip(here[1:], before[1:], strict=True)))


def runs(ids: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Return where the runs of each row start and how long they are, int32 ``[batch, most]`` each.

    Rows with fewer have -1 and 0 behind; runs beyond `most` are left out, of which `sound` tells.

    >>> import jax.numpy as jnp
    >>> starts, lengths = runs(jnp.array([[1, 1, 2, 0, 0]]), most=4)
    >>> starts.tolist(), lengths.tolist()
    ([[0, 2, 3, -1]], [[2, 1, 2, 0]])
    """
    first = begins(ids)
    place = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    slot = jnp.where(first, jnp.cumsum(first, axis=1) - 1, most)
    row = jnp.broadcast_to(jnp.arange(ids.shape[0])[:, None], ids.shape)
    empty = jnp.zeros((ids.shape[0], most), jnp.int32)
    starts = (empty - 1).at[row, slot].set(place, mode="drop")
    return starts, empty.at[row, slot].set(last_keys(ids) - place, mode="drop")


def sound(ids: jax.Array, most: int) -> jax.Array:
    """Return which rows have at most `most` runs, no two of one id: bool ``[batch]``."""
    starts, _ = runs(ids, most)
    named = jnp.take_along_axis(ids, jnp.maximum(starts, 0), axis=1)
    there = starts >= 0
    earlier = jnp.tril(jnp.ones((most, most), bool), -1)
    alike = (named[:, :, None] == named[:, None, :]) & there[:, :, None] & there[:, None, :] & earlier
    return (begins(ids).sum(axis=1) <= most) & ~alike.any(axis=(1, 2))


def marked(query: jax.Array, ids: jax.Array, most: int) -> jax.Array:
    """Return `query` as it is, and as NaN in rows that are not `sound`.

    A kernel that reads runs would pass over such a row's segments without a word; so the loss says it.
    """
    mark = jnp.where(sound(ids, most), 0.0, jnp.nan).astype(query.dtype)
    return query + mark[:, None, None, None]


def by_token(of_runs: jax.Array, ids: jax.Array) -> jax.Array:
    """Return numbers of runs' tokens, ``[runs, heads, sequence]``, by token: ``[batch, sequence, heads]``.

    The runs of all rows stand in one list, as `packed_offsets` has them, each with its tokens from 0 on.

    >>> import jax.numpy as jnp
    >>> numbers = jnp.arange(8.0).reshape(4, 1, 2)
    >>> by_token(numbers, jnp.array([[1, 1], [2, 3]])).ravel().tolist()
    [0.0, 1.0, 2.0, 4.0]
    """
    first = begins(ids).ravel()
    place = jnp.arange(first.size, dtype=jnp.int32)
    start = lax.cummax(jnp.where(first, place, 0))
    found = of_runs[jnp.cumsum(first) - 1, :, place - start]
    return found.reshape(*ids.shape, of_runs.shape[1])


def by_run(of_tokens: jax.Array, ids: jax.Array, most: int) -> jax.Array:
    """Return what `by_token` was given; behind a run's end stands anything finite."""
    batch, size, heads = of_tokens.shape
    starts, _ = packed_offsets(ids, most, 1)
    place = starts.ravel()[: batch * most, None] + jnp.arange(size, dtype=jnp.int32)
    found = of_tokens.reshape(batch * size, heads)[jnp.minimum(place, batch * size - 1)]
    return jnp.swapaxes(found, 1, 2)


def packed_offsets(ids: jax.Array, most: int, per_token: int) -> tuple[jax.Array, jax.Array]:
    """Return offsets ``[batch, most + 1]`` and lengths ``[batch, most]`` of runs, int32, as cuDNN reads them.

    It reads both as one list: the runs of all rows first, offsets in elements of an array of `per_token`
    elements a token, then nothing: no tokens, at the very end. A row's own end does not stand among them.

    Raises UserError where int32 does not count the elements.
    """
    batch, size = ids.shape
    if batch * size * per_token > _MOST_ELEMENTS:
        raise UserError(
            f"cuDNN's packed layout counts {batch} x {size} x {per_token} elements of a device in int32, "
            "which ends at 2,147,483,647; give a device fewer rows at a time, or take attention=cudnn"
        )
    starts, lengths = runs(ids, most)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * size
    order = jnp.argsort((lengths == 0).ravel(), stable=True)
    places = jnp.where(lengths > 0, starts + rows, batch * size).ravel()[order]
    places = jnp.pad(places, (0, batch), constant_values=batch * size) * per_token
    return places.reshape(batch, most + 1), lengths.ravel()[order].reshape(batch, most)
