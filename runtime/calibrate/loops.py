"""Wall-clock loops: seconds of one run of a function, never from a trace."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

# A loop is long enough where it takes this many seconds, or has so many runs.
_LEAST_SECONDS, _MOST_RUNS = 0.05, 200
_LOOPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """Measures until `ends`, a `time.monotonic`; after that there is no time."""

    ends: float

    @classmethod
    def within(cls, seconds: float) -> Clock:
        """Return a clock that ends in so many seconds."""
        return cls(ends=time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds that are left, no less than 0."""
        return max(0.0, self.ends - time.monotonic())

    def parts(self, count: int) -> Iterator[Clock]:
        """Yield a clock for each of `count` parts, which share what is left when their turn comes."""
        for n in range(count, 0, -1):
            yield Clock.within(self.left / n)

    def seconds(self, function: Callable[..., Any], *arrays: Any) -> float | None:
        """Return the seconds of one run of ``jax.jit(function)``, None where no time is left to measure it.

        The median of a few loops of many runs, each waited for at its end: what starts a run is hidden behind
        the run before it, as in training.
        """
        if not self.left:
            return None
        jitted = jax.jit(function)
        jax.block_until_ready(jitted(*arrays))
        once = self._loop(jitted, arrays, 1)
        runs = max(1, min(_MOST_RUNS, int(_LEAST_SECONDS / max(once, 1e-6))))
        found = [once] if runs == 1 else []
        while len(found) < _LOOPS and (self.left or not found):
            found.append(self._loop(jitted, arrays, runs))
        return statistics.median(found)

    @staticmethod
    def _loop(jitted: Callable[..., Any], arrays: tuple[Any, ...], runs: int) -> float:
        # Simulated devices share threads, where collectives of two runs may stand waiting for each other.
        devices = {device for array in jax.tree.leaves(arrays) for device in array.devices()}
        alone = len(devices) > 1 and next(iter(devices)).platform == "cpu"
        start = time.perf_counter()
        out = None
        for _ in range(runs):
            out = jitted(*arrays)
            if alone:
                jax.block_until_ready(out)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / runs
