"""What a call of `ops.attention` asks for, apart from its arrays, and what it leaves to be seen."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from ..errors import UserError, nearest_divisors
from .biases import PlacedBias

_NAME = "meshwright_attention"

# Arrays that change scores and weights beyond what places and segments say.
WEIGHING = ("mask", "bias", "sink", "factor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What one call of `attention` asks for, apart from its arrays.

    `windowed` says that the window is an array, and then `window` is None. `segments` is how many arrays of
    segment ids there are: one for queries and keys alike, or one of each. `ahead` and `prefix` widen what
    causality shows. `given` names the arrays of `WEIGHING` that there are, in that order; behind them come
    the operands of a bias that is worked out by blocks, `placed`. `fill` and `adds` say what hides a score,
    `precision` what products of float32 ask for.
    """

    causal: bool
    window: int | None
    windowed: bool
    cap: float | None
    scale: float
    chunk: int | None
    segments: int
    ahead: int = 0
    prefix: int = 0
    given: tuple[str, ...] = ()
    fill: float | None = None
    adds: bool = True
    precision: str | None = None
    placed: PlacedBias | None = None

    @property
    def name(self) -> str:
        """The name of the call's equation, which tells all of it."""
        told = {
            "causal": self.causal,
            "window": self.window if self.window is not None else self.windowed,
            "cap": self.cap or False,
            "scale": self.scale != 1 and self.scale,
            "chunk": self.chunk or False,
            "segments": self.segments,
            "ahead": self.ahead,
            "prefix": self.prefix,
            **dict.fromkeys(self.given, True),
            "placed": self.placed is not None and self.placed.digest,
            "fill": self.fill is not None and str(self.fill),
            "replaces": not self.adds,
            "precision": self.precision or False,
        }
        words = [key if value is True else f"{key}={value}" for key, value in told.items() if value]
        return f"{_NAME}[{','.join(words)}]"

    def visible(self, queries: int, keys: int) -> float:
        """Return how many (query, key) pairs causality and a window leave; segments hide more."""
        return visible_pairs(
            queries, keys, causal=self.causal, window=self.window, ahead=self.ahead, prefix=self.prefix
        )

    @property
    def fills(self) -> bool:
        """Whether a query that sees no key gets weights of what a number makes of its scores."""
        return self.fill is not None and math.isfinite(self.fill)

    @property
    def operands(self) -> int:
        """How many operands the call's equation has."""
        return self.before_placed + (len(self.placed.operands) if self.placed is not None else 0)

    @property
    def before_placed(self) -> int:
        """How many operands stand before those of a bias that is worked out by blocks."""
        return 3 + self.segments + self.windowed + len(self.given)


@functools.lru_cache(maxsize=1024)
def visible_pairs(
    queries: int, keys: int, *, causal: bool, window: int | None, ahead: int = 0, prefix: int = 0
) -> float:
    """Return how many (query, key) pairs a causal mask leaves, within a window if there is one.

    >>> visible_pairs(4, 4, causal=True, window=None), visible_pairs(4, 4, causal=True, window=2, ahead=1)
    (10.0, 10.0)
    """
    if not causal:
        return float(queries * keys)
    place = np.arange(queries)
    last = np.minimum(np.maximum(place + ahead, prefix - 1), keys - 1)
    first = 0 if window is None else np.maximum(place - window + 1, 0)
    return float(np.maximum(last - first + 1, 0).sum())


def query_chunk(sequence: int, chosen: int | None, *, packed: bool = False) -> int | None:
    """Return how many queries to score at a time; None means all.

    The choice of the config if it made one. Otherwise all up to 4096 queries, and beyond that the largest
    divisor of the sequence from 1024 down to 128, so that scores take at most 1024 × sequence numbers a head;
    a longer sequence without such a divisor is scored whole. Of `packed` rows that XLA has to score it is a
    divisor up to an eighth of the sequence, from 1024 queries on. The values are the same either way.

    Raises `UserError` when the chosen number does not divide a longer sequence.
    """
    if chosen is not None:
        if chosen < sequence and sequence % chosen:
            raise UserError(
                f"attention_chunk={chosen} does not divide sequence={sequence}; "
                f"nearest: {nearest_divisors(sequence, chosen)}"
            )
        return chosen if chosen < sequence else None
    if sequence < 1024 or (sequence <= 4096 and not packed):
        return None
    most = min(1024, sequence // 8) if packed else 1024
    return next((chunk for chunk in range(most, 127, -1) if sequence % chunk == 0), None)
