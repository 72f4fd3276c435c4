"""What carries out a call of attention as it lies on a mesh: a kernel of the chip, blocks, or plain XLA.

The step asks it what to do, and the planner what to price and to say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..attention import AttentionCall
from ..kernels import pair_of_blocks, refusal
from .pieces import CUDNN, SPLASH, PieceKernel, takes_pieces
from .ways import GATHERED, HEADS, NEIGHBOURS, RING, CallSizes, is_balanced, reach_of, way_of

# The axis that ways are over.
CONTEXT = "context"

# Pairs of blocks of queries and keys, in plain XLA.
BLOCKS = "blocks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A call of attention on a mesh.

    query, key, value: have shape and dtype, of all devices together. query_axes, key_axes: the mesh axes that
    cut each of the four dimensions of queries and of keys. given: arrays of pairs and a sink, as the call
    names them.
    """

    call: AttentionCall
    query: Any
    key: Any
    value: Any
    query_axes: tuple[tuple[str, ...], ...]
    key_axes: tuple[tuple[str, ...], ...]
    mesh: Mapping[str, int]
    given: tuple[Any, ...] = ()

    def parts(self, dimension: int) -> int:
        """Return into how many parts a dimension of queries is cut."""
        return math.prod(self.mesh[axis] for axis in self.query_axes[dimension])

    @property
    def over_context(self) -> bool:
        """Whether queries lie over ``context`` alone, keys so too or whole, and heads whole."""
        batch, rows, _, wide = self.query_axes
        key_batch, key_rows, _, key_wide = self.key_axes
        alike = batch == key_batch and not wide and not key_wide
        return alike and rows == (CONTEXT,) and key_rows in ((), (CONTEXT,))

    def numbers(self, given: Any) -> float:
        """Return how many numbers of an array of pairs a device has that has a part of each sequence."""
        cut = (self.parts(0), self.parts(2), self.mesh[CONTEXT], 1)
        return math.prod(size / by if size > 1 else 1 for size, by in zip(given.shape, cut, strict=True))

    @property
    def of_pairs(self) -> tuple[Any, ...]:
        """What is given of pairs of queries and keys."""
        return tuple(x for x in self.given if len(x.shape) > 1)

    @property
    def sizes(self) -> CallSizes:
        """Sizes of the call as one device of all axes but ``context`` sees it."""
        of_heads, heads, kv_heads = self.parts(2), self.query.shape[2], self.key.shape[2]
        # Where its axes do not divide the kv heads, each head of queries has a copy of its own.
        shared = kv_heads == 1 or kv_heads % of_heads == 0
        return CallSizes(
            queries=self.query.shape[1],
            keys=self.key.shape[1],
            heads=heads // of_heads,
            kv_heads=max(kv_heads // of_heads, 1) if shared else heads // of_heads,
            whole=not self.key_axes[1],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    """What carries a call out: a kernel's name, `BLOCKS` or None for plain XLA; the way over ``context``."""

    by: str | None = None
    way: str | None = None


def piece_kernel(settings: Mapping[str, Any], *, interpret: bool = False) -> PieceKernel:
    """Return a plan's kernel as one for pieces of a sequence."""
    if settings["implementation"] != SPLASH:
        return PieceKernel(name=CUDNN, asked=bool(settings.get("pieces")))
    blocks = {side: settings[side] for side in ("block_q", "block_kv")}
    return PieceKernel(name=SPLASH, interpret=interpret, **blocks)


def taken(
    site: Site, settings: Mapping[str, Any] | None, facts: Mapping[str, Any] | None, word: str | None
) -> Taken:
    """Return what carries a call out where a plan says so.

    `settings` is its ``kernels["attention"]``, `facts` what that kernel can do on the plan's chip
    (`kernels.facts_on`), None of both without one; `word` is its way over ``context``.
    """
    kernel = None
    if settings is not None and facts is not None:
        refused = refusal(facts, site.call, site.query, site.key, site.value)
        kernel = settings if refused is None else None
    if word is not None and site.over_context:
        parts = site.mesh[CONTEXT]
        way = way_of(site.call, word, site.sizes, parts)
        # Splash reads gathered keys by itself.
        gathers = way == GATHERED and kernel is not None and kernel["implementation"] == SPLASH
        if way is not None and not gathers:
            reached = kernel is not None and _takes_way(kernel, site.call, way, site.sizes, parts)
            return Taken(by=kernel["implementation"] if kernel and reached else BLOCKS, way=way)
    if kernel is None or site.query_axes[3]:
        return Taken()
    rows = site.parts(1)
    if kernel["implementation"] == SPLASH:
        blocks = pair_of_blocks(site.query.shape[1] // rows, site.key.shape[1], _most(kernel))
        return Taken(by=SPLASH) if blocks else Taken()
    return Taken() if rows > 1 else Taken(by=kernel["implementation"])


def _takes_way(
    kernel: Mapping[str, Any], call: AttentionCall, way: str, sizes: CallSizes, parts: int
) -> bool:
    """Return whether a kernel that takes a call takes what a device has of it, too."""
    if way == RING:
        halves = 1 + is_balanced(call, way, sizes.queries, parts)
        rows = (size // parts // halves for size in (sizes.queries, sizes.keys))
        return takes_pieces(piece_kernel(kernel), call, *rows)
    if kernel["implementation"] != SPLASH:
        return way == HEADS
    rows, keys = sizes.queries, sizes.keys
    if way == NEIGHBOURS:
        rows //= parts
        keys = (reach_of(call, sizes.keys, parts) + 1) * rows
    elif way != HEADS:
        return False
    return pair_of_blocks(rows, keys, _most(kernel)) is not None


def _most(kernel: Mapping[str, Any]) -> tuple[int, int]:
    return kernel["block_q"], kernel["block_kv"]
