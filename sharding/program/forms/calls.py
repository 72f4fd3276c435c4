"""Attention that was found, as a call of `ops.attention`: its arrays laid out, its mask as segments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ...ops.attention import attention
from .attention import WrittenAttention
from .masks import Labels, Part, dtype_of
from .opened import shapes
from .spans import NotThis, Seen, seen_by
from .values import Sources, shape

# Queries that are scored at a time at most; and at least, where scores are few enough to be kept.
_CHUNK, _LEAST = 1024, 64

_LOW = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What a call of attention is made of, apart from its arrays; equal ones of equal shapes are one program.

    Labels are those of `WrittenAttention`; `arrays` are those of the operands in order: query, key, value,
    then segments of queries and keys, then conditions of keys, then of queries. `padding` and `query_padding`
    say of each condition whether true shows or hides.
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
    padding: tuple[bool, ...]
    query_padding: tuple[bool, ...]
    unseeing: float | None
    added: bool
    dtype: str


class Calls:
    """Makes the programs that attention is replaced by, one for all calls that are alike."""

    def __init__(self, values: Sources) -> None:
        self.values = values
        self._made: dict[Any, core.ClosedJaxpr] = {}

    def of(self, one: WrittenAttention) -> tuple[core.ClosedJaxpr, list[Any]]:
        """Return the program that gives the result of `one`, and the atoms that it reads.

        Raises NotThis if `ops.attention` cannot do it, or not with the same values.
        """
        parts = [*one.mask.padding, *one.mask.query_padding]
        atoms, labels, scale = self._operands(one)
        heads = _heads(one, parts)
        of_mask = [*(one.mask.segments[0] if one.mask.segments else ()), *parts]
        call = Call(
            arrays=(*labels, *(part.labels for part in of_mask)),
            out=one.place["out"],
            sizes=one.sizes,
            batch=tuple(d for d in _by_place(one) if d not in heads),
            heads=heads,
            groups=one.groups,
            rows=one.scores.rows,
            keys=one.scores.keys,
            # A cap is put on scores, and not on what of them it divides.
            scale=scale * (one.cap or 1.0),
            cap=one.cap,
            seen=seen_by(one.mask.seen),
            segmented=bool(one.mask.segments),
            padding=tuple(part.how == "false" for part in one.mask.padding),
            query_padding=tuple(part.how == "false" for part in one.mask.query_padding),
            unseeing=_unseeing(one),
            added=any(added for added, _ in one.mask.fills),
            dtype=str(dtype_of(one.product.outvars[0])),
        )
        _check_segments(self.values, one, call)
        inputs = [*atoms, *(part.atom for part in of_mask)]
        kinds = shapes(inputs)
        key = call, tuple((kind.shape, str(kind.dtype)) for kind in kinds)
        if key not in self._made:
            self._made[key] = jax.make_jaxpr(lambda *arrays: _carried_out(call, *arrays))(*kinds)
        return self._made[key], inputs

    def _operands(self, one: WrittenAttention) -> tuple[list[Any], list[Labels], float]:
        """Return query, key and value as they were before heads were repeated or their type was widened."""
        query, key, value = one.query, one.key, one.value
        labels = [one.place["query"], one.place["key"], one.place["value"]]
        narrow, scale = self._narrow([query, key, value])
        if narrow is not None:
            query, key, value = narrow
        if not one.groups:
            key, value, labels[1:] = self._unrepeated(key, value, labels[1:], one)
        return [query, key, value], labels, one.scale * scale

    def _narrow(self, atoms: Sequence[Any]) -> tuple[list[Any] | None, float]:
        """Return the operands in the one type that they were widened from, and what has scaled them since."""
        found, scale = [], 1.0
        for n, atom in enumerate(atoms):
            by = 1.0
            eqn = self.values.made(atom, "mul", "div")
            # A scale between the widening and the product is as well put on the scores.
            number = self.values.number(eqn.invars[1]) if eqn is not None and n < 2 else None
            if eqn is not None and number:
                atom, by = eqn.invars[0], number if eqn.primitive.name == "mul" else 1 / number
            before = self.values.made(atom, "convert_element_type")
            if before is not None:
                atom = before.invars[0]
            elif by != 1.0:
                return None, 1.0
            found.append(self.values.opening.outside(atom))
            scale *= by
        kinds = {str(dtype_of(atom)) for atom in found}
        if len(kinds) != 1 or kinds.isdisjoint(_LOW) or not scale > 0:
            return None, 1.0
        return found, scale

    def _unrepeated(
        self, key: Any, value: Any, labels: Sequence[Labels], one: WrittenAttention
    ) -> tuple[Any, Any, list[Labels]]:
        for head in reversed(_by_place(one)):
            found = [self._before_repeat(a, b, head) for a, b in zip((key, value), labels, strict=True)]
            if found[0] is not None and found[1] is not None and found[0][2] == found[1][2]:
                return found[0][0], found[1][0], [found[0][1], found[1][1]]
        return key, value, list(labels)

    def _before_repeat(self, atom: Any, labels: Labels, head: int) -> tuple[Any, Labels, int] | None:
        """Return an array before each of its heads was repeated, and how often; None if it was not."""
        while (eqn := self.values.made(atom)) is not None:
            if eqn.primitive.name == "transpose":
                order = list(eqn.params["permutation"])
                labels = tuple(labels[order.index(d)] for d in range(len(order)))
            elif eqn.primitive.name not in ("convert_element_type", "copy", "name"):
                break
            elif eqn.primitive.name == "convert_element_type":
                return None
            atom = eqn.invars[0]
        stretch = None if eqn is None else self.values.made(eqn.invars[0], "broadcast_in_dim")
        if eqn is None or eqn.primitive.name != "reshape" or stretch is None or (head,) not in labels:
            return None
        place = labels.index((head,))
        wide, after = shape(stretch.outvars[0]), shape(atom)
        if wide[:place] != after[:place] or wide[place + 2 :] != after[place + 1 :]:
            return None
        source = self.values.opening.outside(stretch.invars[0])
        where, before = list(stretch.params["broadcast_dimensions"]), shape(source)
        kept = [d for n, d in enumerate(where) if before[n] == wide[d] and d != place + 1]
        others = [d for d in range(len(wide)) if d != place + 1 and (d in kept or wide[d] != 1)]
        if (
            kept != others
            or place not in kept
            or any(before[n] != 1 for n, d in enumerate(where) if d not in kept)
        ):
            return None
        of_wide = [*labels[: place + 1], (), *labels[place + 1 :]]
        return source, tuple(of_wide[d] if d in kept else () for d in where), wide[place + 1]


def _by_place(one: WrittenAttention) -> list[int]:
    """Return the labels that queries and keys share, in the order in which they stand in queries."""
    order = [label for dim in one.place["query"] for label in dim]
    return [label for label in order if label in one.scores.batch]


def _heads(one: WrittenAttention, parts: Sequence[Part]) -> tuple[int, ...]:
    """Return the label of the heads of keys: the last that queries and keys share and that no mask has."""
    shared = _by_place(one)
    of_masks = {d for pair in one.mask.segments for part in pair for d in part.has()}
    of_masks.update(d for part in parts for d in part.has())
    free = [d for d in shared if d not in of_masks]
    if not free and len(shared) > 1 and of_masks:
        raise NotThis("its mask differs from head to head")
    return tuple(free[-1:]) if len(shared) > 1 else ()


def _unseeing(one: WrittenAttention) -> float | None:
    """Return what hidden scores become, if queries may see nothing; None if each sees a key."""
    mask = one.mask
    if not mask.padding and not mask.query_padding:
        return None
    if mask.unseen is None:
        raise NotThis("a query may see no key, and what it gets then is not the mean of all")
    if one.cap is not None and any(added for added, _ in mask.fills):
        raise NotThis("a query may see no key, and a cap shapes its gradient then")
    return mask.unseen


def _check_segments(values: Sources, one: WrittenAttention, call: Call) -> None:
    """Raise NotThis unless segments can be told by one array, and a query sees its own place."""
    mask = one.mask
    if not mask.segments:
        if (call.padding or call.query_padding) and call.seen.block is not None:
            raise NotThis("it has blocks and padding at once")
        return
    own, theirs = mask.segments[0]
    kinds = {values.digest(part.atom) for pair in mask.segments for part in pair}
    if len(kinds) != 1 or one.sizes[call.rows] != one.sizes[call.keys]:
        raise NotThis("queries and keys have segments of different arrays, and a query may see no key")
    if call.seen.block is not None or call.seen.first is not None:
        raise NotThis("it has segments and blocks at once")
    if not np.issubdtype(own.atom.aval.dtype, np.integer) or not np.issubdtype(
        theirs.atom.aval.dtype, np.integer
    ):
        raise NotThis("its segments are told by numbers that are no integers")
    if call.query_padding or call.padding:
        conditions = {(values.digest(part.atom), part.how) for part in mask.padding}
        of_queries = {(values.digest(part.atom), part.how) for part in mask.query_padding}
        told = all(_told_by(values, part, kinds) for part in mask.padding)
        if not (told or conditions == of_queries) or not conditions:
            raise NotThis("it has segments and padding at once, and a query may see no key")


def _told_by(values: Sources, part: Part, kinds: set[int]) -> bool:
    """Whether a condition compares the segments themselves with a number."""
    eqn = values.made(part.atom, "eq", "ne", "gt", "ge", "lt", "le")
    if eqn is None:
        return False
    return values.number(eqn.invars[1]) is not None and values.digest(values.plain(eqn.invars[0])) in kinds


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


def _carried_out(call: Call, *arrays: Any) -> Any:
    """Return what the product with values gave, of the arrays of `call`."""
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
    ids, sees = _ids(call, query.shape[0], arrays[3:])
    out = attention(
        query,
        key,
        value,
        segment_ids=None if ids is None else ids[0],
        key_segment_ids=None if ids is None or ids[1] is ids[0] else ids[1],
        causal=call.seen.causal,
        window=call.seen.window,
        cap=call.cap,
        scale=call.scale,
        chunk=_chunk(query.shape[1]),
    )
    if sees is not None:
        out = jnp.where(sees[:, :, None, None], out, _of_unseeing(call, query, key, value))
    # A width and groups of heads are as many as the result has of them.
    out = laid_out(out, (*orders[0][:3], (width,)), call.out, call.sizes)
    return out.astype(call.dtype)


def _chunk(rows: int) -> int | None:
    """Return how many queries XLA scores at a time, so that scores are not kept for the backward pass."""
    return next((size for size in range(min(_CHUNK, rows // 2), _LEAST - 1, -1) if rows % size == 0), None)


def _of_unseeing(call: Call, query: Any, key: Any, value: Any) -> Any:
    """Return what a query gets whose scores are all hidden, ``[batch, rows, heads, width]``.

    They are alike then, and it gets the mean of values. Where a number was added to hide them, their gradient
    still reaches queries and keys: that of a softmax of equal scores, which is linear in them, by the
    covariance of keys and values.
    """
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
        next_array(call.rows, rows)
        own = next_array(call.keys, keys).astype(jnp.int32)
        segments = (own, own)
    shown = _all([(next_array(call.keys, keys) != 0) == shows for shows in call.padding])
    asking = _all([(next_array(call.rows, rows) != 0) == shows for shows in call.query_padding])
    first, last = call.seen.first or 0, keys - 1 if call.seen.last is None else call.seen.last
    if first > 0 or last < keys - 1:
        place = jnp.arange(keys, dtype=jnp.int32)
        within = (place >= first) & (place <= last)
        shown = within[None] if shown is None else shown & within
        shown = jnp.broadcast_to(shown, (batch, keys))
    if call.seen.block is not None:
        own = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32) // call.seen.block, (batch, keys))
        return (own, own), None
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
