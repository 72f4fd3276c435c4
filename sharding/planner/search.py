"""The best of a space of candidates, the runners-up, and how far from fitting it is where nothing fits.

Keeping less for the backward pass, or working the batch through in more parts, saves memory and never makes a
step faster by more than what it lets hide (`_SLACK`), but for pipelines, whose every number of microbatches
starts a row of its own. So the time of a layout that keeps everything and takes
the batch whole bounds whatever can be had with it, and candidates taken from a queue in the order of their
bounds are final once they fit: what comes out first is the best, what comes next the runner-up, and most of
the space is never priced.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..cost.candidate import Candidate
from .space import Space

if TYPE_CHECKING:
    from ..cost.estimate import Estimate

# What a candidate costs; the smaller the better.
Price = Callable[[Candidate], "Estimate"]
# What a layout stores on a device in bytes, as far as it decides.
Stored = Callable[[Candidate], float]

# Layout, remat and microbatches by their places in a Space, after what they are ordered by: what is stored
# where that counts, seconds, bytes.
_Entry = tuple[float, float, float, int, int, int]

# By which share recomputing or more microbatches may make a step faster at most: they give collectives more
# to hide behind.
_SLACK = 0.005
_RUNNERS_UP = 6
# What stores so many times the least that any layout does counts as storing as little.
_ABOUT_EQUAL = 1.1
# A mesh size whose bound is that many times the best is not worked out further.
_WORTH_SOLVING = 1.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Priced:
    """A candidate with its Estimate; `fits` says whether a device's memory holds it.

    `bound` says that it stands for others, which keep less or take the batch in parts and are no faster.
    """

    candidate: Candidate
    estimate: Estimate
    fits: bool
    bound: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: `best` (None if nothing fits), runners-up of other layouts, best first.

    `misfits` are layouts that no remat and no number of microbatches make fit, at their smallest, the one
    nearest to fitting first. `priced` counts the candidates that were looked at.
    """

    best: Priced | None
    others: tuple[Priced, ...]
    misfits: tuple[Priced, ...]
    priced: int


def search(
    space: Space,
    price: Price,
    capacity_bytes: float,
    *,
    stored: Stored | None = None,
    runners_up: int = _RUNNERS_UP,
    each_size: bool = True,
) -> Found:
    """Return the fastest candidate of `space` that fits into `capacity_bytes` a device.

    Args:
        space: what to choose from.
        price: gives a candidate's Estimate.
        capacity_bytes: memory of a device.
        stored: where given, what is stored on a device decides before time does.
        runners_up: how many other layouts to return in order.
        each_size: also return the best for every size of every mesh axis, or a bound on it where that is far
            from the best of all.
    """
    searching = _Search(space, price, capacity_bytes, stored or (lambda _: 0.0))
    ranked = list(itertools.islice(searching.ranked(range(len(space.layouts))), 1 + runners_up))
    if ranked and each_size:
        ranked += searching.best_of_sizes(ranked)
    return Found(
        best=ranked[0] if ranked else None,
        others=tuple(ranked[1:]),
        misfits=searching.misfits(),
        priced=searching.count,
    )


class _Search:
    def __init__(self, space: Space, price: Price, capacity_bytes: float, stored: Stored) -> None:
        self._space, self._price, self._capacity = space, price, capacity_bytes
        sizes = [stored(layout) for layout in space.layouts]
        enough = _ABOUT_EQUAL * min(sizes, default=0.0)
        self._stored = [0.0 if size <= enough else size for size in sizes]
        self._seen: dict[tuple[int, int, int], Priced] = {}
        self._hopeless: dict[int, Priced] = {}

    @property
    def count(self) -> int:
        """Candidates priced so far."""
        return len(self._seen)

    def misfits(self) -> tuple[Priced, ...]:
        """Return what was found not to fit at all, the smallest first."""
        return tuple(sorted(self._hopeless.values(), key=lambda one: one.estimate.peak_bytes))

    def ranked(self, layouts: range | list[int]) -> Iterator[Priced]:
        """Yield the best candidate of each layout that fits, best first."""
        # Candidates that may still lead to better ones, by what those could be at best; and those that fit.
        open_ = [self._entry(*place, _SLACK) for layout in layouts for place in self._starts(layout)]
        heapq.heapify(open_)
        fitting: list[_Entry] = []
        seen: set[tuple[int, int, int]] = set()
        done: set[int] = set()
        while open_ or fitting:
            if fitting and (not open_ or fitting[0][:2] <= open_[0][:2]):
                place = heapq.heappop(fitting)[-3:]
                if place[0] not in done:
                    done.add(place[0])
                    yield self._at(*place)
                continue
            place = heapq.heappop(open_)[-3:]
            if place in seen or place[0] in done:
                continue
            seen.add(place)
            if self._at(*place).fits:
                heapq.heappush(fitting, self._entry(*place, 0.0))
            elif not self._can_fit(place[0]):
                done.add(place[0])
                continue
            least, seconds, size = self._entry(*place, _SLACK)[:3]
            for following in self._after(*place):
                heapq.heappush(open_, (least, seconds, size, *following))

    def best_of_sizes(self, ranked: list[Priced]) -> list[Priced]:
        """Return the best for each size of each axis that `ranked` lacks, best first."""
        have = {(axis, size) for one in ranked for axis, size in one.candidate.mesh.items()}
        members: dict[tuple[str, int], list[int]] = {}
        for index, layout in enumerate(self._space.layouts):
            for place in layout.mesh.items():
                if place not in have:
                    members.setdefault(place, []).append(index)
        best = ranked[0].estimate.step_seconds
        found = [self._best_or_bound(layouts, _WORTH_SOLVING * best) for layouts in members.values()]
        unique = {id(one.candidate): one for one in found if one is not None}.values()
        return sorted(unique, key=lambda one: one.estimate.step_seconds)

    def _best_or_bound(self, layouts: list[int], worth_seconds: float) -> Priced | None:
        fastest = min(
            (self._at(*place) for layout in layouts for place in self._starts(layout)),
            key=lambda one: one.estimate.step_seconds,
        )
        if fastest.fits or fastest.estimate.step_seconds <= worth_seconds:
            return next(self.ranked(layouts), None)
        return dataclasses.replace(fastest, bound=True)

    def _entry(self, layout: int, remat: int, parts: int, slack: float) -> _Entry:
        estimate = self._at(layout, remat, parts).estimate
        seconds = estimate.step_seconds * (1 - slack)
        return (self._stored[layout], seconds, estimate.peak_bytes, layout, remat, parts)

    def _starts(self, layout: int) -> Iterator[tuple[int, int, int]]:
        """Yield the candidates of a layout that bound all others of it."""
        candidate = self._space.layouts[layout]
        # A pipeline's bubble shrinks with more microbatches, so that no number of them bounds another.
        counts = len(self._space.parts(candidate)) if _is_pipeline(candidate) else 1
        for parts in range(counts):
            yield (layout, 0, parts)

    def _after(self, layout: int, remat: int, parts: int) -> Iterator[tuple[int, int, int]]:
        candidate = self._space.layouts[layout]
        if remat + 1 < len(self._space.remats) and remat + 1 not in self._space.heads:
            yield (layout, remat + 1, parts)
        # The other ladders keep less of the same and send it further: only where all of it is too much.
        if remat == 0 and not self._at(layout, remat, parts).fits:
            yield from ((layout, head, parts) for head in self._space.heads[1:])
        if not _is_pipeline(candidate) and parts + 1 < len(self._space.parts(candidate)):
            yield (layout, remat, parts + 1)

    def _can_fit(self, layout: int) -> bool:
        """Whether the layout fits when it keeps least and takes the batch in the most parts."""
        if layout in self._hopeless:
            return False
        last = len(self._space.parts(self._space.layouts[layout])) - 1
        ends = [head - 1 for head in (*self._space.heads[1:], len(self._space.remats))]
        smallest = min((self._at(layout, end, last) for end in ends), key=lambda one: one.estimate.peak_bytes)
        if not smallest.fits:
            self._hopeless[layout] = smallest
        return smallest.fits

    def _at(self, layout: int, remat: int, parts: int) -> Priced:
        key = (layout, remat, parts)
        if key not in self._seen:
            base = self._space.layouts[layout]
            candidate = self._space.remats[remat].on(base, self._space.parts(base)[parts])
            estimate = self._price(candidate)
            self._seen[key] = Priced(
                candidate=candidate, estimate=estimate, fits=bool(estimate.peak_bytes <= self._capacity)
            )
        return self._seen[key]


def _is_pipeline(layout: Candidate) -> bool:
    return layout.mesh.get("stage", 1) > 1


def stored_bytes(sizes: Mapping[int, int], slots: float) -> Stored:
    """Return what says how much of parameters and moments a layout stores on a device.

    `sizes` maps parameter argument index → bytes, `slots` is the moments' bytes over the parameters'.
    """

    def stored(layout: Candidate) -> float:
        total = 0.0
        for index, size in sizes.items():
            for part, weight in ((layout.stored, 1.0), (layout.optimizer, slots)):
                cut = math.prod(layout.mesh[axis] for axes in part[index] for axis in axes)
                total += weight * size / cut
        return total

    return stored
