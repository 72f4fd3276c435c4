"""A call of attention of which each device of a mesh axis has a part of the sequence.

Four ways, told by what moves: ``gathered`` (all keys and values to every device), ``neighbours`` (the chunks
that a window reaches back to), ``ring`` (chunks of keys go round, one turn at a time) and ``heads`` (the
sequence is traded for heads, and back). All axes that cut batch or heads have to be manual as well: left to
XLA, what a loop carries is gathered in each of its turns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..attention import AttentionCall, scaled
from ..biases import HEADS as OF_HEADS
from ..biases import KEYS, QUERIES, PlacedBias
from .blocks import (
    Asked,
    Blocks,
    Pairs,
    cut,
    cut_ids,
    cut_rows,
    finished,
    floats,
    fold,
    joined,
    joined_rows,
    less,
    no_gradients,
    places,
    unfold,
    unseen,
    with_floats,
)
from .order import into_balance, out_of_balance
from .pairs import OfPairs, traded
from .pieces import PieceKernel
from .ring import Ring, RingKeys, ring_backward, ring_forward
from .ring_kernel import RingWork, kernel_backward, kernel_forward
from .turns import collected, query_starts
from .ways import GATHERED, HEADS, NEIGHBOURS, RING, copies_of, is_balanced, reach_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """`call` over the `parts` devices of mesh axis `axis`, of so many `queries` and `keys` in all.

    way:     a word of `ways.WAYS`.
    whole:   each device has all keys already, so that none move.
    kernel:  what works through the pieces of a ring, None for blocks of plain XLA.
    name:    what the result and its sums are kept under by rematerialisation, if anything.
    """

    call: AttentionCall
    way: str
    axis: str
    parts: int
    queries: int
    keys: int
    whole: bool = False
    name: str | None = None
    kernel: PieceKernel | None = None

    @property
    def balanced(self) -> bool:
        """Whether devices take a chunk of either end, for causality to leave each as much to do."""
        return is_balanced(self.call, self.way, self.queries, self.parts)


class Others(NamedTuple):
    """What a call takes besides queries, keys and values: segment ids of a device's rows, and a window.

    And what a bias is made of: arrays of a device's queries, of its keys, and of neither. `of_pairs` have the
    rows of its queries and all keys, `sink` is of its heads.
    """

    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None
    window: jax.Array | None = None
    of_queries: tuple[jax.Array, ...] = ()
    of_keys: tuple[jax.Array, ...] = ()
    of_neither: tuple[jax.Array, ...] = ()
    of_pairs: OfPairs = OfPairs()
    sink: jax.Array | None = None


def attend_spread(
    spread: Spread,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    others: Others,
    whole: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Return attention of a device's queries ``[batch, queries / parts, heads, head_dim]``.

    Runs where the axis, and all that cut batch or heads, are manual. `whole` is a kernel of the chip, of
    (query, key, value, *ids): for ``heads`` of whole sequences, for ``neighbours`` of a device's queries and
    the keys from the farthest chunk on that they see.
    """
    if spread.way == HEADS:
        return _by_heads(spread, query, key, value, others, whole)
    if spread.way == NEIGHBOURS and whole is not None:
        return _beside_neighbours(spread, query, key, value, others, whole)
    if not spread.balanced:
        query = query if spread.kernel is None else scaled(query, spread.call.scale)
        return _attend(spread, query, key, value, others)
    place = functools.partial(into_balance, axis=spread.axis, parts=spread.parts)
    ids = others.query_ids
    if spread.way == RING:
        key, value = place(key), place(value)
        same = others.key_ids is ids
        key_ids = None if others.key_ids is None else place(others.key_ids)
        others = others._replace(key_ids=key_ids, of_keys=tuple(map(place, others.of_keys)))
        ids = key_ids if same else ids
    if ids is not None and ids is not others.key_ids:
        ids = place(ids)
    if spread.kernel is not None:
        query = scaled(query, spread.call.scale)
    of_queries = tuple(map(place, others.of_queries))
    others = others._replace(query_ids=ids, of_queries=of_queries, of_pairs=others.of_pairs.rows(place))
    out: Any = _attend(spread, place(query), key, value, others)
    return out_of_balance(out, spread.axis, spread.parts)


def _by_heads(
    spread: Spread,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    others: Others,
    whole: Callable[..., jax.Array] | None,
) -> jax.Array:
    copies = copies_of(key.shape[2], spread.parts)
    if copies > 1:
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    trade = functools.partial(lax.all_to_all, axis_name=spread.axis, tiled=True)
    query, key, value = (trade(x, split_axis=2, concat_axis=1) for x in (query, key, value))
    query_ids, key_ids = (
        None if ids is None else lax.all_gather(ids, spread.axis, axis=1, tiled=True)
        for ids in (others.query_ids, others.key_ids)
    )
    if whole is not None:
        out = whole(query, key, value, *(ids for ids in (query_ids, key_ids) if ids is not None))
    else:
        alone = dataclasses.replace(spread, way=GATHERED, parts=1, whole=True)
        pairs = functools.partial(traded, axis=spread.axis, me=_me(spread), parts=spread.parts)
        sink = others.sink
        if sink is not None:
            sink = lax.dynamic_slice_in_dim(sink, _me(spread) * query.shape[2], query.shape[2])
        mine = Others(query_ids, key_ids, others.window, of_pairs=others.of_pairs.each(pairs), sink=sink)
        if spread.call.placed is not None:
            of_queries, of_keys, of_neither = _of_all_rows(spread, spread.call.placed, others, query.shape[2])
            mine = mine._replace(of_queries=of_queries, of_keys=of_keys, of_neither=of_neither)
        out = _attend(alone, query, key, value, mine)
    return trade(out, split_axis=1, concat_axis=2)


def _of_all_rows(
    spread: Spread, bias: PlacedBias, others: Others, heads: int
) -> Iterator[tuple[jax.Array, ...]]:
    """Yield what a bias is made of, of whole sequences and of the heads that a device has after the trade."""
    for along in (QUERIES, KEYS, None):
        some = {QUERIES: others.of_queries, KEYS: others.of_keys, None: others.of_neither}[along]
        operands = [one for one in bias.operands if one.along == along]
        found = []
        for one, x in zip(operands, some, strict=True):
            if along is not None:
                x = lax.all_gather(x, spread.axis, axis=1, tiled=True)
            for axis in (n for n, dim in enumerate(one.laid) if dim == (OF_HEADS,)):
                x = lax.dynamic_slice_in_dim(x, _me(spread) * heads, heads, axis)
            found.append(x)
        yield tuple(found)


def _beside_neighbours(
    spread: Spread,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    others: Others,
    whole: Callable[..., jax.Array],
) -> jax.Array:
    reach = reach_of(spread.call, spread.keys, spread.parts)
    ids = jnp.zeros(query.shape[:2], jnp.int32) if others.query_ids is None else others.query_ids
    # What stands before the sequence is of a segment that no query has.
    own = ids if others.key_ids is None else others.key_ids
    there = with_neighbours(spread, reach, jnp.ones_like(own))
    key_ids = jnp.where(there == 1, with_neighbours(spread, reach, own), -1)
    key, value = (with_neighbours(spread, reach, x) for x in (key, value))
    # What is compiled says where the device's queries stand among these keys.
    before = reach * spread.keys // spread.parts
    with jax.named_scope(spread.call.name.replace("[", f"[before={before},", 1)):
        return whole(query, key, value, ids, key_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spread: Spread, query: jax.Array, key: jax.Array, value: jax.Array, others: Others) -> jax.Array:
    return _forward(spread, query, key, value, others)[0]


def _forward(
    spread: Spread, query: jax.Array, key: jax.Array, value: jax.Array, others: Others
) -> tuple[jax.Array, Any]:
    if spread.kernel is not None:
        ids = others.query_ids, others.key_ids
        out, sums = kernel_forward(_work(spread, spread.kernel), query, key, value, *ids)
    else:
        asked, queries = _asked(spread, others), _queries(spread, query, None, others, key.shape[2])
        if spread.way == RING:
            travelling = RingKeys(key, value, others.key_ids, others.of_keys)
            state = ring_forward(asked, _ring(spread), queries, travelling)
        else:
            keys, pairs, _ = _collected(spread, key, value, others)
            state = fold(asked, queries, keys, pairs, unseen(queries, value.shape[3]))
        # Without a number that stands for what is hidden, no sum of weights is not a number.
        lost = spread.call.fill is not None and not spread.call.fills
        sink = _sink(others, key.shape[2])
        out, sums = finished(state, sink, np.nan if lost else 0.0, apart=spread.call.fills)
        out = joined(out)
    out = out.astype(value.dtype)
    if spread.name is not None:
        out, sums = jax.tree.map(lambda x: checkpoint_name(x, spread.name), (out, sums))
    return out, (query, key, value, others, out, sums)


def _backward(spread: Spread, kept: Any, d_out: jax.Array) -> tuple[Any, ...]:
    query, key, value, others, out, sums = kept
    if spread.kernel is not None:
        told = others.query_ids, others.key_ids, out, sums, d_out
        grads = kernel_backward(_work(spread, spread.kernel), query, key, value, *told)
        d_query, d_key, d_value = (
            x.astype(like.dtype) for x, like in zip(grads, (query, key, value), strict=True)
        )
        return d_query, d_key, d_value, None
    asked, kv_heads = _asked(spread, others), key.shape[2]
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1, keepdims=True)
    queries = _queries(spread, query, d_out, others, kv_heads)
    delta = cut(delta, queries.x.shape[-2], kv_heads)[..., 0]
    if spread.way == RING:
        travelling = RingKeys(key, value, others.key_ids, others.of_keys)
        grads = ring_backward(asked, _ring(spread), queries, travelling, sums, delta)
        d_key, d_value = (joined(x).astype(key.dtype) for x in (grads.key, grads.value))
        of_keys = _like(grads.of_keys, others.of_keys)
    else:
        keys, pairs, back = _collected(spread, key, value, others)
        none = no_gradients(asked, queries, keys)
        grads = unfold(asked, queries, keys, sums, delta, pairs, none)
        d_key, d_value = (joined(x).astype(key.dtype) for x in (grads.key, grads.value))
        d_key, d_value, *of_keys = back((d_key, d_value, *_like(grads.of_keys, others.of_keys)))
    of_bias = [_like(grads.of_queries, others.of_queries), of_keys]
    of_bias.append(
        [g.astype(x.dtype) for g, x in zip(grads.of_neither, floats(others.of_neither), strict=True)]
    )
    learnt = _gradients(others, of_bias)
    of_pairs = zip(grads.of_pairs, others.of_pairs.learnt, strict=True)
    learnt = learnt._replace(
        of_pairs=others.of_pairs.with_learnt(tuple(g.astype(x.dtype) for g, x in of_pairs), lambda _: None),
        sink=_of_sink(others, sums, delta),
    )
    return joined(grads.query).astype(query.dtype), d_key, d_value, learnt


_attend.defvjp(_forward, _backward)


def _like(gradients: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Return gradients in blocks as the floats among `arrays` lie."""
    return [joined_rows(g).astype(x.dtype) for g, x in zip(gradients, floats(arrays), strict=True)]


def _sink(others: Others, kv_heads: int) -> jax.Array | None:
    """Return a sink as the largest scores of blocks lie, of all but their heads 1."""
    sink = others.sink
    return None if sink is None else sink.astype(jnp.float32).reshape(1, 1, kv_heads, -1, 1)


def _of_sink(others: Others, sums: Sequence[jax.Array], delta: jax.Array) -> jax.Array | None:
    """Return the gradient of a sink, a score without a value, of all queries' sums and results."""
    sink = _sink(others, delta.shape[2])
    if sink is None or others.sink is None:
        return None
    weights = jnp.exp(less(sink, sums))
    return -(weights * delta).sum((0, 1, 4)).reshape(-1).astype(others.sink.dtype)


def _gradients(others: Others, of_bias: Sequence[Sequence[jax.Array]]) -> Others:
    """Return the gradients of what a call takes besides: of the floats that a bias is made of."""
    arrays = (others.of_queries, others.of_keys, others.of_neither)
    found = []
    for some, learnt in zip(arrays, of_bias, strict=True):
        mine = iter(learnt)
        found.append(tuple(next(mine) if floats([x]) else None for x in some))
    return Others(None, None, None, *found)


def _asked(spread: Spread, others: Others) -> Asked:
    window = spread.call.window if others.window is None else others.window
    return Asked(spread.call, window, others.of_neither, others.of_pairs)


def _work(spread: Spread, kernel: PieceKernel) -> RingWork:
    return RingWork(_ring(spread), kernel, spread.call)


def _ring(spread: Spread) -> Ring:
    return Ring(axis=spread.axis, parts=spread.parts, balanced=spread.balanced)


def _me(spread: Spread) -> Any:
    return lax.axis_index(spread.axis) if spread.parts > 1 else 0


def _query_starts(spread: Spread) -> tuple[np.ndarray, int]:
    return query_starts(spread.queries, spread.parts, balanced=spread.balanced)


def _queries(
    spread: Spread, query: jax.Array, d_out: jax.Array | None, others: Others, kv_heads: int
) -> Blocks:
    first, rows = _query_starts(spread)
    mine = jnp.asarray(first)[_me(spread)]
    d_out = None if d_out is None else cut(d_out, rows, kv_heads)
    ids, of_bias = cut_ids(others.query_ids, rows), tuple(cut_rows(x, rows) for x in others.of_queries)
    return Blocks(cut(query, rows, kv_heads), d_out, places(mine, rows), ids, of_bias)


def _collected(
    spread: Spread, key: jax.Array, value: jax.Array, others: Others
) -> tuple[Blocks, Pairs, Callable[..., Any]]:
    """Return the keys that a device needs, which of them it sees, and the way back of their gradients."""
    me, ids = _me(spread), others.key_ids
    sizes = {"queries": spread.queries, "keys": spread.keys, "parts": spread.parts, "whole": spread.whole}
    there = collected(spread.call, spread.way, **sizes)
    rows = there.rows
    if spread.way == NEIGHBOURS:
        reach = reach_of(spread.call, spread.keys, spread.parts)
        move: Callable[..., jax.Array] = functools.partial(with_neighbours, spread, reach)
    elif spread.whole:
        move = lambda x: x
    else:
        move = functools.partial(lax.all_gather, axis_name=spread.axis, axis=1, tiled=True)
    ids, learnt = None if ids is None else move(ids), floats(others.of_keys)
    (key, value, *learnt), back = jax.vjp(lambda *all_: tuple(move(x) for x in all_), key, value, *learnt)
    keys = cut(key, rows), cut(value, rows)
    of_bias = with_floats([x if floats([x]) else move(x) for x in others.of_keys], learnt)
    counts = there.counts
    pairs = Pairs(jnp.asarray(there.first)[me], jnp.asarray(counts)[me], int(counts.sum(-1).max()))
    begin = jnp.asarray(there.begins.astype(np.int32))[me] + np.arange(0, there.blocks * rows, rows)
    of_bias = tuple(cut_rows(x, rows) for x in of_bias)
    return Blocks(*keys, places(begin, rows), cut_ids(ids, rows), of_bias), pairs, back


def with_neighbours(spread: Spread, reach: int, x: jax.Array) -> jax.Array:
    """Return a device's rows behind those of the `reach` devices before it; zeros where there is none."""
    parts = [
        lax.ppermute(x, spread.axis, [(own - far, own) for own in range(far, spread.parts)])
        for far in range(reach, 0, -1)
    ]
    return jnp.concatenate([*parts, x], axis=1)
