"""Which blocks of keys a device's blocks of queries see, and in how many turns it works through them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from ..attention import AttentionCall
from .blocks import block_of, seen_blocks, starts
from .order import chunks_of
from .ways import HEADS, NEIGHBOURS, RING, is_balanced, reach_of


class TurnCounts(NamedTuple):
    """Rows of a block of queries and of keys, and pairs of them: of a device's own keys, and in each chunk.

    `chunks` is how many chunks come from other devices in a ring, 0 in other ways.
    """

    rows: int
    key_rows: int
    own: int
    each: int
    chunks: int

    @property
    def pairs(self) -> int:
        """All turns of the device that has most."""
        return self.own + self.each * self.chunks


class Collected(NamedTuple):
    """Blocks of keys that devices have collected, and which of them blocks of queries see, by device.

    first, counts: int32 ``[parts, blocks of queries]``; begins: where each device's keys begin, which for the
    first ones is before the sequence does where `before` rows come from neighbours.
    """

    rows: int
    blocks: int
    before: int
    begins: np.ndarray
    first: np.ndarray
    counts: np.ndarray


def query_starts(queries: int, parts: int, *, balanced: bool) -> tuple[np.ndarray, int]:
    """Return the first places of all devices' blocks of queries ``[parts, blocks]``, and a block's rows."""
    chunks = chunks_of(parts, balanced=balanced)
    chunk = queries // chunks.size
    rows = block_of(chunk)
    return starts(chunks, chunk, rows), rows


def collected(
    call: AttentionCall, way: str, *, queries: int, keys: int, parts: int, whole: bool
) -> Collected:
    """Return what is seen of keys that are all there before the first turn: every way but a ring."""
    chunk, before = keys // parts, 0
    if way == NEIGHBOURS:
        before, rows = reach_of(call, keys, parts) * chunk, block_of(chunk)
    else:
        rows = block_of(keys if whole else chunk)
    blocks = (before + chunk if way == NEIGHBOURS else keys) // rows
    begins = np.array([own * chunk - before if way == NEIGHBOURS else 0 for own in range(parts)])
    first, query_rows = query_starts(queries, parts, balanced=is_balanced(call, way, queries, parts))
    told = [
        seen_blocks(call, own, query_rows, np.int64(begin), rows, blocks)
        for own, begin in zip(first, begins, strict=True)
    ]
    firsts, counts = (np.stack(one).astype(np.int32) for one in zip(*told, strict=True))
    return Collected(rows, blocks, before, begins, firsts, counts)


def seen_at_home(call: AttentionCall, blocks: int, rows: int, key_blocks: int, key_rows: int) -> Any:
    """Return the first blocks of its own keys that a device's queries see in a ring, and how many.

    They stand in order, whichever chunks of the sequence these are. A window hides further.
    """
    call = dataclasses.replace(call, window=None)
    return seen_blocks(call, np.arange(blocks) * rows, rows, np.int64(0), key_rows, key_blocks)


def seen_away(blocks: int, key_blocks: int, *, balanced: bool) -> np.ndarray:
    """Return how many blocks are seen of a chunk of a device after, and of one before, ``[2, blocks]``.

    As many either way. Balanced: of what comes from before, all queries see the low chunk; of what comes from
    after, the high queries see both.
    """
    count = np.full((2, blocks), key_blocks, np.int32)
    if balanced:
        count[0, : blocks // 2] = 0
        count[1] = key_blocks // 2
    return count


@functools.lru_cache(maxsize=1024)
def turns_of(
    call: AttentionCall, way: str, *, queries: int, keys: int, parts: int, whole: bool
) -> TurnCounts:
    """Return in how many turns the device that has most works a call through, the arrays' sizes whole.

    >>> asked = {"window": None, "windowed": False, "cap": None, "scale": 1.0, "chunk": None, "segments": 0}
    >>> causal = AttentionCall(causal=True, **asked)
    >>> turns_of(causal, "ring", queries=16384, keys=16384, parts=4, whole=False).pairs  # of 8 x 32
    132
    """
    if way == HEADS:
        parts, whole = 1, True
    if way != RING:
        found = collected(call, way, queries=queries, keys=keys, parts=parts, whole=whole)
        _, rows = query_starts(queries, parts, balanced=is_balanced(call, way, queries, parts))
        return TurnCounts(rows, found.rows, int(found.counts.sum(-1).max()), 0, 0)
    balanced = is_balanced(call, way, queries, parts)
    first, rows = query_starts(queries, parts, balanced=balanced)
    blocks, key_rows = first.shape[1], block_of(keys // parts // (1 + balanced))
    key_blocks = keys // parts // key_rows
    home = int(seen_at_home(call, blocks, rows, key_blocks, key_rows)[1].sum())
    each = int(seen_away(blocks, key_blocks, balanced=balanced)[0].sum())
    return TurnCounts(rows, key_rows, home, each, parts - 1)
