"""What attention that was found is replaced by: a call of `ops.attention` and what lays its arrays out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...ops.attention import attention
from ...ops.biases import BoundBias, PlacedBias
from ...ops.segments import seeing
from .masks import Labels
from .spans import NotThis, Seen

# Queries that are scored at a time at most; and at least, where scores are few enough to be kept.
_CHUNK, _LEAST = 1024, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a call of attention is made of, apart from its arrays; equal ones of equal shapes are one program.

    Labels are those of `WrittenAttention`; `arrays` are those of the operands in order: query, key, value,
    then segments of queries and keys, then conditions of keys, then of queries, then of both (`pairs`), then
    biases, then factors of weights, then a sink. `padding`, `query_padding` and `pairs` say of each condition
    whether true shows or hides; `factors` too, None of one that is a number. `biases` say what each is
    multiplied by. `further` are labels of queries and keys of further products, whose arrays come last, and
    what each is multiplied by beside the first. Before them come those that scores of a query are multiplied
    by (`scaled`), or divided by. Behind all are operands of a bias that is worked out by blocks, `placed`;
    not those that are `counted`, which tells their types and sizes. `literal` says that a query that sees
    nothing gets what `fill` makes of it, `blank` that it gets zeros.
    """

    arrays: tuple[Labels, ...]
    out: Labels
    sizes: tuple[int, ...]
    batch: tuple[int, ...]
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    rows: int
    keys: int
    scale: float
    cap: float | None
    seen: Seen
    segmented: bool
    apart: bool
    padding: tuple[bool, ...]
    query_padding: tuple[bool, ...]
    unseeing: float | None
    added: bool
    dtype: str
    pairs: tuple[bool, ...] = ()
    biases: tuple[float, ...] = ()
    factors: tuple[bool | None, ...] = ()
    sink: bool = False
    times: float = 1.0
    literal: bool = False
    fill: float | None = None
    precision: str | None = None
    further: tuple[tuple[Labels, Labels, float], ...] = ()
    scaled: tuple[tuple[Labels, bool], ...] = ()
    blank: bool = False
    placed: PlacedBias | None = None
    counted: tuple[tuple[str, int] | None, ...] = ()

    @property
    def over_scores(self) -> int:
        """How many of the last arrays are laid out over scores."""
        return len(self.pairs) + len(self.biases) + len(self.factors)


def laid_out(array: Any, labels: Labels, order: Sequence[Sequence[int]], sizes: Sequence[int]) -> Any:
    """Return `array` with the dimensions of `labels` as `order` merges them; what it lacks is 1."""
    size = {d: array.shape[n] if len(dim) == 1 else sizes[d] for n, dim in enumerate(labels) for d in dim}
    atoms = list(size)
    array = _reshaped(array, [size[d] for d in atoms])
    wanted = [atoms.index(d) for dim in order for d in dim if d in size]
    if wanted != list(range(len(atoms))):
        array = array.transpose(wanted)
    return _reshaped(array, [math.prod(size.get(d, 1) for d in dim) for dim in order])


def _reshaped(array: Any, after: Sequence[int]) -> Any:
    return array if list(array.shape) == list(after) else array.reshape(after)


def carried_out(call: Call, *arrays: Any) -> Any:
    """Return what the product with values gave, of the arrays of `call`."""
    bias, arrays = _bound(call, arrays)
    summed = tuple(sorted((d for dim in call.arrays[0] for d in dim if d < 0), reverse=True))
    width = len(call.sizes) - 1
    orders = [
        (call.batch, (call.rows,), (*call.heads, *call.groups), summed),
        (call.batch, (call.keys,), call.heads, summed),
        (call.batch, (call.keys,), call.heads, (width,)),
    ]
    query, key, value = (
        laid_out(array, labels, order, call.sizes)
        for array, labels, order in zip(arrays[:3], call.arrays[:3], orders, strict=True)
    )
    value = value.astype(query.dtype)
    if call.further:
        count = 2 * len(call.further)
        query, key = _joined(call, query, key, arrays[-count:], orders)
        arrays = arrays[:-count]
    if call.scaled:
        query = _scaled(call, query, arrays[-len(call.scaled) :], orders[0][:3])
        arrays = arrays[: -len(call.scaled)]
    last = len(arrays) - call.over_scores - call.sink
    ids, sees = _ids(call, query.shape[0], arrays[3:last])
    weighing: dict[str, Any] = _weighing(call, arrays[last:]) | ({} if bias is None else {"bias": bias})
    out = attention(
        query,
        key,
        value,
        segment_ids=None if ids is None else ids[0],
        key_segment_ids=None if ids is None or ids[1] is ids[0] else ids[1],
        causal=call.seen.causal,
        window=call.seen.window,
        ahead=call.seen.ahead,
        prefix=call.seen.prefix,
        cap=call.cap,
        scale=call.scale,
        chunk=_chunk(query.shape[1], key.shape[1], query.shape[3]),
        fill=call.fill,
        adds=call.fill is None or call.added,
        precision=call.precision,
        **weighing,
    )
    if sees is not None and not call.literal:
        out = jnp.where(sees[:, :, None, None], out, _of_unseeing(call, query, key, value))
    if call.times != 1.0:
        out = out * jnp.asarray(call.times, out.dtype)
    # A width and groups of heads are as many as the result has of them.
    out = laid_out(out, (*orders[0][:3], (width,)), call.out, call.sizes)
    return out.astype(call.dtype)


def _bound(call: Call, arrays: tuple[Any, ...]) -> tuple[BoundBias | None, tuple[Any, ...]]:
    """Return a bias that is worked out by blocks, with its operands, and all other arrays."""
    if call.placed is None:
        return None, arrays
    count = call.counted.count(None)
    given, found = iter(arrays[len(arrays) - count :]), []
    for one, counted in zip(call.placed.operands, call.counted, strict=True):
        array = next(given) if counted is None else jnp.arange(counted[1], dtype=counted[0])
        found.append(one.into(array))
    return BoundBias(call.placed, tuple(found)), arrays[: len(arrays) - count]


def _joined(
    call: Call, query: Any, key: Any, arrays: Sequence[Any], orders: Sequence[Sequence[Sequence[int]]]
) -> tuple[Any, Any]:
    """Return queries and keys joined along their width with those of further products.

    A product of what is joined is the sum of the products. Keys that all heads share are given to each.
    """
    queries, keys = [query], [key]
    for (of_query, of_key, by), one, other in zip(call.further, arrays[::2], arrays[1::2], strict=True):
        summed = tuple(sorted((d for dim in of_query for d in dim if d < 0), reverse=True))
        places = (of_query, [*orders[0][:3], summed]), (of_key, [*orders[1][:3], summed])
        one, other = (
            laid_out(array, labels, order, call.sizes)
            for array, (labels, order) in zip((one, other), places, strict=True)
        )
        one = one if by == 1.0 else one * jnp.asarray(by, one.dtype)
        for found, whole, more in ((queries, query, one), (keys, key, other)):
            found.append(jnp.broadcast_to(more, (*whole.shape[:3], more.shape[3])).astype(whole.dtype))
    return jnp.concatenate(queries, axis=3), jnp.concatenate(keys, axis=3)


def _scaled(call: Call, query: Any, arrays: Sequence[Any], order: Sequence[Sequence[int]]) -> Any:
    """Return queries multiplied, or divided, by numbers of their own, of each head or of all."""
    found = query
    for array, (labels, multiplies) in zip(arrays, call.scaled, strict=True):
        by = _over(array, labels, order, call.sizes)[..., None]
        found = found * by if multiplies else found / by
    return found.astype(query.dtype)


def _weighing(call: Call, arrays: Sequence[Any]) -> dict[str, Any]:
    """Return mask, bias, factor and sink of what is laid out over scores, those that there are."""
    order = (call.batch, (*call.heads, *call.groups), (call.rows,), (call.keys,))
    labels = call.arrays[len(call.arrays) - len(arrays) :]
    laid = [_over(array, one, order, call.sizes) for array, one in zip(arrays, labels, strict=True)]
    pairs, biases = len(call.pairs), len(call.pairs) + len(call.biases)
    found = {
        "mask": _all([(one != 0) == shows for one, shows in zip(laid[:pairs], call.pairs, strict=True)]),
        "bias": _sum(
            [one if by == 1 else one * by for one, by in zip(laid[pairs:biases], call.biases, strict=True)]
        ),
        "factor": _product(
            [
                one if shows is None else (one != 0) == shows
                for one, shows in zip(laid[biases : biases + len(call.factors)], call.factors, strict=True)
            ]
        ),
    }
    if call.sink:
        heads = math.prod(call.sizes[d] for d in order[1])
        if laid[-1].size > laid[-1].shape[1]:
            raise NotThis("its sink differs from query to query")
        found["sink"] = jnp.broadcast_to(laid[-1][0, :, 0, 0], (heads,))
    return found


def _over(array: Any, labels: Labels, order: Sequence[Sequence[int]], sizes: Sequence[int]) -> Any:
    """Return `array` over scores; where it has some of what a dimension merges, it is given all of that."""
    single = laid_out(array, labels, [(d,) for dim in order for d in dim], sizes)
    has = iter(single.shape)
    wanted = [[next(has) for _ in dim] for dim in order]
    full = [
        [sizes[d] for d in dim] if any(size > 1 for size in mine) else mine
        for dim, mine in zip(order, wanted, strict=True)
    ]
    single = jnp.broadcast_to(single, [size for dim in full for size in dim])
    return _reshaped(single, [math.prod(dim) for dim in full])


def _sum(arrays: Sequence[Any]) -> Any:
    return functools.reduce(lambda one, other: one + other, arrays) if arrays else None


def _product(arrays: Sequence[Any]) -> Any:
    return functools.reduce(lambda one, other: one * other, arrays) if arrays else None


def _chunk(rows: int, keys: int, head_dim: int) -> int | None:
    """Return how many queries XLA scores at a time, so that scores are not kept for the backward pass.

    None for all at once where scores, of four bytes, take no more than twice what queries, keys, values and
    the result take in halves, 8 bytes times `head_dim` a place and head: chunks are scored once more for the
    gradient, which short sequences pay for with more time than they save of memory.
    """
    if keys <= 4 * head_dim:
        return None
    return next((size for size in range(min(_CHUNK, rows // 2), _LEAST - 1, -1) if rows % size == 0), None)


def _of_unseeing(call: Call, query: Any, key: Any, value: Any) -> Any:
    """Return what a query gets whose scores are all hidden, ``[batch, rows, heads, width]``.

    They are alike then, and it gets the mean of values. Where a number was added to hide them, their gradient
    still reaches queries and keys: that of a softmax of equal scores, which is linear in them, by the
    covariance of keys and values.
    """
    if call.blank:
        return jnp.asarray(0, query.dtype)
    if call.unseeing is None or not math.isfinite(call.unseeing):
        return jnp.asarray(jnp.nan, query.dtype)
    group = query.shape[2] // value.shape[2]
    key, value = (jnp.repeat(one.astype(jnp.float32), group, axis=2) for one in (key, value))
    mean = jnp.mean(value, axis=1, keepdims=True)
    if call.added:
        constant = jax.lax.stop_gradient(value - mean) * (call.scale / key.shape[1])
        around = jnp.einsum("bshd,bshw->bhdw", key, constant)
        moved = jnp.einsum("bthd,bhdw->bthw", query.astype(jnp.float32), around)
        mean = mean + (moved - jax.lax.stop_gradient(moved))
    return mean.astype(query.dtype)


def _ids(call: Call, batch: int, arrays: Sequence[Any]) -> tuple[tuple[Any, Any] | None, Any]:
    """Return segment ids of queries and keys, and which queries see any key where some may not."""
    rows, keys = call.sizes[call.rows], call.sizes[call.keys]
    labels = list(call.arrays[3:])

    def next_array(along: int, size: int) -> Any:
        nonlocal arrays
        array = laid_out(arrays[0], labels.pop(0), (call.batch, (along,)), call.sizes)
        arrays = arrays[1:]
        return jnp.broadcast_to(array, (batch, size))

    segments = None
    if call.segmented:
        asks = next_array(call.rows, rows)
        own = next_array(call.keys, keys).astype(jnp.int32)
        segments = (asks.astype(jnp.int32) if call.literal or call.apart else own, own)
    shown = _all([(next_array(call.keys, keys) != 0) == shows for shows in call.padding])
    asking = _all([(next_array(call.rows, rows) != 0) == shows for shows in call.query_padding])
    first, last = call.seen.first or 0, keys - 1 if call.seen.last is None else call.seen.last
    if first > 0 or last < keys - 1:
        place = jnp.arange(keys, dtype=jnp.int32)
        within = (place >= first) & (place <= last)
        shown = within[None] if shown is None else shown & within
        shown = jnp.broadcast_to(shown, (batch, keys))
    if call.literal and (shown is not None or asking is not None):
        return _literal_ids(segments, shown, asking, (batch, rows, keys)), None
    if call.seen.block is not None:
        own = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32) // call.seen.block, (batch, keys))
        return (own, own), None
    if segments is not None and call.apart:
        shown = jnp.ones((batch, keys), bool) if shown is None else shown
        ids, sees = _ids_apart(call, *segments, shown)
        return ids, sees if asking is None else sees & asking
    if shown is None and asking is None:
        return segments, None
    if segments is not None:
        # A query that sees nothing is padding itself, and gets padding to look at.
        hidden = jnp.min(segments[0], axis=1, keepdims=True) - 1
        assert shown is not None
        own = jnp.where(shown, segments[0], hidden)
        return (own, own), shown if asking is None else shown & asking
    if shown is None:
        return None, asking
    sees = _sees(call, shown, rows)
    ids = (sees.astype(jnp.int32), shown.astype(jnp.int32))
    if not call.padding:
        return ids, asking
    return ids, sees if asking is None else sees & asking


def _literal_ids(segments: Any, shown: Any, asking: Any, sizes: tuple[int, int, int]) -> tuple[Any, Any]:
    """Return ids that are equal exactly where a query sees a key."""
    batch, rows, keys = sizes
    own, theirs = segments or (jnp.zeros((batch, rows), jnp.int32), jnp.zeros((batch, keys), jnp.int32))
    if segments is not None:
        # Three numbers for each segment: what is seen, a query that asks for nothing, a key that is hidden.
        own, theirs = own * 3, theirs * 3
    asking = jnp.zeros_like(own) if asking is None else jnp.where(asking, 0, 1)
    shown = jnp.zeros_like(theirs) if shown is None else jnp.where(shown, 0, 2)
    return own + asking, theirs + shown


def _ids_apart(call: Call, asks: Any, own: Any, shown: Any) -> tuple[tuple[Any, Any], Any]:
    """Return ids of queries and of keys that hide what is not shown, and which queries see a key.

    A query that sees none gets a key to look at that its place does not hide: a kernel divides by the sum of
    its weights.
    """
    seen = call.seen
    behind = None if seen.window is None else seen.window - 1
    sees = seeing(asks, own, shown, behind=behind, ahead=seen.ahead if seen.causal else None)
    hidden = jnp.minimum(asks.min(axis=1, keepdims=True), own.min(axis=1, keepdims=True)) - 1
    own = jnp.where(shown, own, hidden)
    other = own if asks.shape == own.shape else own[:, :1]
    return (jnp.where(sees, asks, other), own), sees


def _sees(call: Call, shown: Any, rows: int) -> Any:
    """Return which queries see a key that is shown, bool ``[batch, rows]``; each sees one by its place."""
    batch, keys = shown.shape
    if not call.seen.causal:
        return jnp.broadcast_to(jnp.any(shown, axis=1, keepdims=True), (batch, rows))
    if rows != keys:
        raise NotThis("it is causal and padded with another number of keys than queries")
    count = jnp.cumsum(shown.astype(jnp.int32), axis=1)
    if call.seen.window is not None:
        before = jnp.pad(count, ((0, 0), (call.seen.window, 0)))[:, :keys]
        count = count - before
    return count > 0


def _all(conditions: Sequence[Any]) -> Any:
    found = None
    for one in conditions:
        found = one if found is None else found & one
    return found
