"""Ways in which attention goes over devices that share a sequence: which can do a call, what they send."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ...errors import nearest, nearest_divisors, wrong
from ..attention import AttentionCall
from .order import moved_share

GATHERED, HEADS, RING, NEIGHBOURS = "gathered", "heads", "ring", "neighbours"
WAYS = (GATHERED, HEADS, RING, NEIGHBOURS)


def check_way(word: str | None) -> None:
    """Raise UserError for a word that is no way."""
    if word is not None and (not isinstance(word, str) or word not in WAYS):
        raise wrong("context", word, f"is no way of attention over context; {nearest(str(word), WAYS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallSizes:
    """Sizes of a call of attention as one device of all other mesh axes sees it, the sequences whole.

    `whole` says that keys are not cut, so that each device has all of them.
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    whole: bool = False


def is_balanced(call: AttentionCall, way: str, queries: int, parts: int) -> bool:
    """Return whether a call is worked through in balanced order, see `order`; a ring has to be."""
    if parts == 1 or not call.causal or call.window is not None or call.fills:
        return False
    return way == RING or (way == GATHERED and queries % (2 * parts) == 0)


def reach_of(call: AttentionCall, keys: int, parts: int) -> int:
    """Return how many chunks before a query's own its window reaches, of `parts` that `keys` are cut into."""
    return parts - 1 if call.window is None else min(parts - 1, -(-(call.window - 1) // (keys // parts)))


def copies_of(kv_heads: int, parts: int) -> int:
    """Return how often kv heads are repeated so that `parts` divides them.

    >>> copies_of(8, 4), copies_of(2, 8), copies_of(6, 4)
    (1, 4, 2)
    """
    return parts // math.gcd(parts, kv_heads)


def why_not(call: AttentionCall, way: str, sizes: CallSizes, parts: int) -> str | None:
    """Return why `way` cannot carry out a call over `parts` devices, None if it can.

    What is nearest divides `parts`: other axes take the rest of the devices.
    """
    if call.fills and call.causal and way in (RING, NEIGHBOURS):
        return f"a query that sees no key gets what {call.fill:g} makes of it with all keys"
    each = 2 if is_balanced(call, way, sizes.queries, parts) else 1
    for name, size in (("queries", sizes.queries), ("keys", sizes.keys)):
        if name == "keys" and sizes.whole:
            continue
        of = each if name == "queries" or way == RING else 1
        if size % (parts * of):
            halves = "" if of == 1 else " into chunks of two halves"
            near = nearest_divisors(math.gcd(size // of, parts), parts)
            return f"context={parts} does not divide {size} {name}{halves}; nearest: {near}"
    if way != GATHERED and sizes.whole:
        return "every device has all its keys, so that none have to move"
    return _why_not_so(call, way, sizes, parts)


def _why_not_so(call: AttentionCall, way: str, sizes: CallSizes, parts: int) -> str | None:
    if way == HEADS:
        wanted = sizes.kv_heads * copies_of(sizes.kv_heads, parts)
        if sizes.heads % parts or sizes.heads % wanted:
            near = nearest_divisors(math.gcd(sizes.heads, parts), parts)
            return f"context={parts} does not divide {sizes.heads} heads of queries; nearest: {near}"
    if way == NEIGHBOURS:
        if call.window is None:
            return "it has no window that is known beforehand"
        if call.ahead or call.prefix or sizes.queries != sizes.keys:
            return "its window reaches ahead of queries"
        reach = reach_of(call, sizes.keys, parts)
        if reach >= parts - 1:
            return f"window={call.window} reaches over all {parts} chunks of {sizes.keys // parts} keys"
    if way == RING and call.causal:
        if call.ahead or call.prefix or sizes.queries != sizes.keys:
            return "its queries see more than what is before them"
        if call.window is not None:
            return (
                f"a ring works with all keys, and window={call.window} hides most; "
                "neighbours takes what it reaches"
            )
    return None


def way_of(call: AttentionCall, word: str, sizes: CallSizes, parts: int) -> str | None:
    """Return the way in which a plan with the word `word` carries out a call, None where XLA does it.

    A window that reaches few chunks goes to neighbours whatever the word; what the word's way cannot do
    goes by gathered keys.
    """
    tried = (NEIGHBOURS, word, GATHERED)
    return next((way for way in tried if why_not(call, way, sizes, parts) is None), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
    """Bytes that a device sends for one call: forward, and backward."""

    forward: float
    backward: float


def sent(
    call: AttentionCall, way: str, sizes: CallSizes, parts: int, *, query: float, key: float, item: int
) -> Sent:
    """Return what a device sends.

    Args:
        call: what is asked for.
        way: a word of `WAYS`.
        sizes: of the call.
        parts: devices of the axis.
        query: bytes of queries and of the result together that a device has.
        key: bytes of keys and values that a device has.
        item: bytes of a number of keys, whose gradients travel in float32 in a ring.
    """
    far = parts - 1
    balance = moved_share(parts) if is_balanced(call, way, sizes.queries, parts) else 0.0
    if way == RING:
        # Gradients go a whole round, home with the last hop.
        back = far * key + parts * key * 4 / item
        moved = balance * (query + key)
        return Sent(forward=far * key + moved, backward=back + moved)
    if way == HEADS:
        traded = (query + key * copies_of(sizes.kv_heads, parts)) * far / parts
        return Sent(forward=traded, backward=traded)
    chunks = reach_of(call, sizes.keys, parts) if way == NEIGHBOURS else 0 if sizes.whole else far
    moved = balance * query
    # Keys are fetched again for the backward pass, and their gradients go where they came from.
    return Sent(forward=chunks * key + moved, backward=2 * chunks * key + moved)


def held(
    call: AttentionCall, way: str, sizes: CallSizes, parts: int, *, query: float, key: float, item: int
) -> float:
    """Return the bytes that a device has beside a call's operands while it works on its gradient.

    Arguments are those of `sent`. Gradients are summed in float32.
    """
    wide = 4 / item
    if way == RING:
        # Two chunks under way and their gradients, a device's own share of these, its queries' gradient.
        return 2 * key + 3 * key * wide + query / 2 * wide
    if way == HEADS:
        traded = query + key * copies_of(sizes.kv_heads, parts)
        return 2 * traded + (query / 2 + key * copies_of(sizes.kv_heads, parts)) * wide
    chunks = reach_of(call, sizes.keys, parts) + 1 if way == NEIGHBOURS else parts
    return chunks * key * (1 + wide) + query / 2 * wide


def described(way: Any) -> str:
    """Say what a way does."""
    return {
        GATHERED: "every device gathers all keys",
        HEADS: "the sequence is traded for heads",
        RING: "chunks of keys go round",
        NEIGHBOURS: "chunks within the window are fetched",
    }[way]
