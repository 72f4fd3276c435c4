"""The best of a space of candidates, the runners-up, and how far from fitting it is where nothing fits.

A candidate is a layout, a remat policy and a number of microbatches; the code names one by its three places
in the `Space`: (layout, remat, part). The policies come as ladders (`choices/remat.py`): each rung of a
ladder keeps less for the backward pass than the rung before it.

Keeping less, or taking more microbatches, saves memory and makes a step slower, or faster by the share
`_SLACK` at most, since it gives collectives more work to hide behind. (A pipeline is the exception: its
bubble shrinks with more microbatches.) So a layout that keeps everything and takes the batch whole gives a
lower bound on the time of every candidate with that layout, once what keeping costs is taken off (`kept`).

The search is best-first over these bounds: it takes the layout with the smallest bound from a queue, finds
its fastest candidate that fits, and yields a candidate once no bound left in the queue is below its time.
What is yielded first is the best, what is yielded next the runner-up, and most of the space is never priced:
a layout is in the queue by what is known of it without its storage, until it comes first.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..cost.candidate import Candidate
from .space import Space

if TYPE_CHECKING:
    from ..plans.estimate import Estimate

# What a candidate costs; the smaller the better.
Price = Callable[[Candidate], "Estimate"]
# The peak memory of a candidate in bytes, as its Estimate says it.
Size = Callable[[Candidate], float]
# Seconds that a candidate without stages takes at least, which are found sooner than what it costs.
Least = Callable[[Candidate], float]
# Bytes that a layout takes of a device at least, whatever it keeps and in however many microbatches: they are
# found much sooner than a size.
Floor = Callable[[Candidate], float]
# What a layout stores on a device in bytes, as far as it decides.
StoredBytes = Callable[[Candidate], float]

# The largest share by which recomputing or more microbatches can make a step faster.
_SLACK = 0.005
_RUNNERS_UP = 6
# How many of the layouts that do not fit are returned.
_MISFITS = 16
# A layout that stores up to this many times the least that any layout stores counts as storing as little.
_ABOUT_EQUAL = 1.1
# Where all layouts were asked for.
_ALL = (math.inf, math.inf)
# For a size of an axis whose bound is more than this many times the best step, the bound is the answer.
_WORTH_SOLVING = 1.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Priced:
    """A candidate with its Estimate; `fits` says whether a device's memory holds it.

    With `bound` its seconds are a lower bound on those of a size of an axis, and it does not fit itself.
    """

    candidate: Candidate
    estimate: Estimate
    fits: bool
    bound: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: `best` (None if nothing fits) and `others`, the best of other layouts in order.

    `misfits` are layouts that fit under no remat and no number of microbatches, each as the candidate that
    takes least memory, the nearest to fitting first. `priced` counts the candidates that were looked at.
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
    size: Size | None = None,
    least: Least | None = None,
    floor: Floor | None = None,
    stored: StoredBytes | None = None,
    runners_up: int = _RUNNERS_UP,
    each_size: bool = True,
    below: float = math.inf,
) -> Found:
    """Return the fastest candidate of `space` that fits into `capacity_bytes` a device.

    Args:
        space: what to choose from.
        price: gives a candidate's Estimate.
        capacity_bytes: memory of a device.
        size: gives a candidate's peak memory alone, where that takes less than its price.
        least: gives the seconds that a candidate takes at least, whatever it stores, sooner than its price.
        floor: gives the bytes that a layout takes at least, sooner than its size: what needs more than there
            is is measured only to be told of.
        stored: gives the bytes that a layout stores on a device; where given, fewer bytes come before less
            time.
        runners_up: how many other layouts to return in order.
        each_size: also return the best for every size of every mesh axis, or a bound on it where that is far
            from the best of all.
        below: only what takes fewer seconds than that.
    """
    sized = size or (lambda candidate: price(candidate).needed_bytes)
    searching = _Search(space, price, sized, capacity_bytes, stored or (lambda _: 0.0), least, floor)
    ranked = list(itertools.islice(searching.ranked(range(len(space.layouts)), below), 1 + runners_up))
    if ranked and each_size:
        ranked += searching.best_of_sizes(ranked)
    return Found(
        best=ranked[0] if ranked else None,
        others=tuple(ranked[1:]),
        misfits=searching.misfits(),
        priced=searching.count,
    )


def anything_fits(space: Space, capacity_bytes: float, size: Size, floor: Floor | None = None) -> bool:
    """Whether any candidate of `space` fits into `capacity_bytes` a device, by sizes alone."""

    def price(candidate: Candidate) -> Estimate:
        raise AssertionError(candidate)

    return _Search(space, price, size, capacity_bytes, lambda _: 0.0, floor=floor).anything_fits()


class _Search:
    def __init__(
        self,
        space: Space,
        price: Price,
        size: Size,
        capacity_bytes: float,
        stored: StoredBytes,
        least: Least | None = None,
        floor: Floor | None = None,
    ) -> None:
        self._space, self._price, self._capacity = space, price, capacity_bytes
        self._size, self._least, self._floor = size, least, floor
        sizes = [stored(layout) for layout in space.layouts]
        enough = _ABOUT_EQUAL * min(sizes, default=0.0)
        self._stored = [0.0 if size <= enough else size for size in sizes]
        self._seen: dict[tuple[int, int, int], Priced] = {}
        self._sizes: dict[tuple[int, int, int], float] = {}
        self._can: dict[int, bool] = {}
        self._floors: dict[int, float] = {}
        # Of what fits nowhere, up to which stored bytes and seconds layouts were asked for.
        self._asked: dict[int, tuple[float, float]] = {}
        # Of a layout alone, and asked for again with those that share the size of an axis. (A cache on a
        # method would be a circle, and all that was found garbage for the collector.)
        self._roughs: dict[int, float] = {}
        self._bounds: dict[int, float] = {}
        self._bounds_in_memory: dict[int, float] = {}
        self._bests: dict[int, Priced | None] = {}

    @property
    def count(self) -> int:
        """Candidates looked at so far: priced, or at least measured for their memory."""
        return len(self._sizes)

    def anything_fits(self) -> bool:
        """Whether any layout fits, all kept or as little as can be."""
        return any(
            self._can_fit(layout) or all(self._fits(*place) for place in self._firsts(layout))
            for layout in range(len(self._space.layouts))
        )

    def misfits(self) -> tuple[Priced, ...]:
        """Return what fits nowhere, would come before what was asked for, and is nearest to fitting.

        The smallest come first.
        """
        missed = (
            layout
            for layout in self._nearest()
            if self._asked[layout] == _ALL
            or (self._stored[layout], self._bound(layout)) < self._asked[layout]
        )
        return tuple(self._at(*self._smallest(layout)) for layout in itertools.islice(missed, _MISFITS))

    def _nearest(self) -> Iterator[int]:
        """Yield what fits nowhere and was asked for, the smallest first, measured where its turn may be."""
        # By what they take at least until that is least of all; of equals the first asked for.
        open_ = [(self._floor_of(layout), False, n, layout) for n, layout in enumerate(self._asked)]
        heapq.heapify(open_)
        while open_:
            _, is_measured, n, layout = heapq.heappop(open_)
            if is_measured:
                yield layout
            else:
                heapq.heappush(open_, (self._sized(*self._smallest(layout)), True, n, layout))

    def ranked(self, layouts: range | list[int], below: float = math.inf) -> Iterator[Priced]:
        """Yield the best candidate of each layout that fits and takes less than `below`, best first."""
        # Two heaps: layouts by their bounds, and the best candidates of the layouts already taken from there.
        bounds = [(self._stored[layout], self._rough(layout), layout, 0) for layout in layouts]
        open_ = [one for one in bounds if one[1] < below]
        # What asks for memory alone, and sees what fits nowhere, comes before what prices.
        closer = (self._bound_in_memory, self._bound)
        heapq.heapify(open_)
        fitting: list[tuple[float, float, float, int, Priced]] = []
        hopeless: list[int] = []
        while open_ or fitting:
            if fitting and (not open_ or fitting[0][:2] <= open_[0][:2]):
                self._ask(hopeless, fitting[0][:2])
                yield heapq.heappop(fitting)[-1]
                continue
            _, rough, layout, known = heapq.heappop(open_)
            if known < len(closer):
                bound = max(rough, closer[known](layout))
                if not self._can.get(layout, True):
                    hopeless.append(layout)
                elif bound < below:
                    heapq.heappush(open_, (self._stored[layout], bound, layout, known + 1))
                continue
            best = self._best(layout)
            if best is not None and best.estimate.step_seconds < below:
                estimate = best.estimate
                order = (self._stored[layout], estimate.step_seconds, estimate.peak_bytes)
                heapq.heappush(fitting, (*order, layout, best))
        self._ask(hopeless, _ALL)

    def _ask(self, hopeless: list[int], upto: tuple[float, float]) -> None:
        """Note that layouts were asked for in the order of what they store and take, and up to what."""
        for layout in hopeless:
            self._asked[layout] = max(self._asked.get(layout, upto), upto)

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
        fastest = self._fastest(layouts)
        if fastest.fits or _least_seconds(fastest.estimate) <= worth_seconds:
            return next(self.ranked(layouts), None)
        return _least(fastest)

    def _fastest(self, layouts: list[int]) -> Priced:
        """Return the fastest of `layouts` with everything kept, the first of equals."""
        best, least, place = None, math.inf, -1
        for rough, layout in sorted((self._rough(layout), layout) for layout in layouts):
            if rough > least and best is not None:
                break
            for one in (self._at(*place) for place in self._firsts(layout)):
                seconds = _least_seconds(one.estimate)
                if best is None or (seconds, layout) < (least, place):
                    best, least, place = one, seconds, layout
        assert best is not None
        return best

    def _rough(self, layout: int) -> float:
        """Return what is known without a price of the seconds that a layout takes at least."""
        if layout not in self._roughs:
            # Of a pipeline in the most microbatches.
            self._roughs[layout] = self._least_of(*list(self._firsts(layout))[-1]) * (1 - _SLACK)
        return self._roughs[layout]

    def _least_of(self, layout: int, remat: int, part: int) -> float:
        return 0.0 if self._least is None else self._least(self._candidate(layout, remat, part))

    def _bound(self, layout: int) -> float:
        """Return a lower bound on the seconds of a layout."""
        if layout not in self._bounds:
            self._bounds[layout] = self._bounded(layout)
        return self._bounds[layout]

    def _bounded(self, layout: int) -> float:
        found, firsts = math.inf, [(self._least_of(*place), place) for place in self._firsts(layout)]
        for least, place in sorted(firsts):
            if least >= found:
                break
            found = min(found, _least_seconds(self._at(*place).estimate))
        return found * (1 - _SLACK)

    def _bound_in_memory(self, layout: int) -> float:
        """Return a lower bound on the seconds of a layout in the memory that there is, found without a price.

        It is infinity where nothing fits. Where what keeps most does not fit, of each ladder the first rung
        that fits, whole or in the most microbatches, bounds all that do: they keep no more, and take it in
        no fewer parts than the whole.
        """
        if layout not in self._bounds_in_memory:
            self._bounds_in_memory[layout] = self._bounded_in_memory(layout)
        return self._bounds_in_memory[layout]

    def _bounded_in_memory(self, layout: int) -> float:
        firsts = list(self._firsts(layout))
        if not self._is_too_much(layout) and all(self._fits(*place) for place in firsts):
            return 0.0
        if not self._can_fit(layout):
            return math.inf
        last, part = len(self._space.parts(self._space.layouts[layout])) - 1, firsts[-1][-1]
        found = math.inf
        for ladder in self._apart(layout):
            rung = min(self._first_fitting(layout, ladder, parts) for parts in {0, last})
            if rung < ladder.stop:
                found = min(found, self._least_of(layout, rung, part) * (1 - _SLACK))
        return found

    def _first_fitting(self, layout: int, rungs: range, part: int) -> int:
        """Return the first of `rungs`, over which memory falls, that fits in so many parts, or their end."""
        return rungs.start + bisect.bisect_left(rungs, True, key=lambda rung: self._fits(layout, rung, part))

    def _apart(self, layout: int) -> list[range]:
        """Return the ladders over which memory falls: what is kept by name may take more than all of it."""
        first, *others = self._ladders(layout)
        return [one for one in (first[:1], first[1:], *others) if one]

    def _firsts(self, layout: int) -> Iterator[tuple[int, int, int]]:
        """Yield the candidates that keep most, the fastest of which bounds the layout's seconds.

        That for the whole batch is enough but in a pipeline, whose bubble shrinks with more microbatches.
        """
        candidate, first = self._space.layouts[layout], self._ladders(layout)[0][0]
        count = len(self._space.parts(candidate)) if _is_pipeline(candidate) else 1
        return ((layout, first, part) for part in range(count))

    def _ladders(self, layout: int) -> list[range]:
        return self._space.ladders(self._space.layouts[layout])

    def _best(self, layout: int) -> Priced | None:
        """Return the fastest candidate of a layout that fits, the smallest of equals, or None."""
        if layout not in self._bests:
            self._bests[layout] = self._solved(layout)
        return self._bests[layout]

    def _solved(self, layout: int) -> Priced | None:
        ladders = self._apart(layout)
        if all(self._fits(*place) for place in self._firsts(layout)):
            # Ladders after the first keep values on the host: only where the device cannot hold them all.
            first = self._ladders(layout)[0]
            ladders = [ladder for ladder in ladders if ladder.start in first]
        elif not self._can_fit(layout):
            return None
        fitting = [one for ladder in ladders for one in self._descend(layout, ladder)]
        return min(
            fitting, key=lambda one: (one.estimate.step_seconds, one.estimate.peak_bytes), default=None
        )

    def _descend(self, layout: int, ladder: range) -> Iterator[Priced]:
        """Yield the candidates of `layout` on `ladder` that fit and may be the fastest.

        Those are at the corners where neither fewer microbatches nor a rung that keeps more would fit. From
        each corner the search goes on, to more microbatches and to later rungs, as long as a step gets faster
        (`_SLACK`).
        """
        candidate = self._space.layouts[layout]
        count = len(self._space.parts(candidate))
        if _is_pipeline(candidate):
            # Its seconds may fall and rise again with more microbatches.
            for part in range(count):
                yield from self._stairs(layout, ladder, range(part, part + 1))
            return
        # From one microbatch to two, memory may grow: a microbatch's gradients lie beside their sum. From two
        # on it falls with their number. So one and more than one are searched apart.
        for parts in (range(min(count, 1)), range(1, count)):
            yield from self._stairs(layout, ladder, parts)

    def _stairs(self, layout: int, ladder: range, parts: range) -> Iterator[Priced]:
        """Yield what `_descend` does among `parts`, over which memory falls, as it does over the rungs.

        So the border of what fits is a staircase, walked from its corner with most microbatches by bisection.
        """
        rung, part = ladder.start, parts.stop
        while part > parts.start and rung < ladder.stop:
            rung = self._first_fitting(layout, range(rung, ladder.stop), part - 1)
            if rung == ladder.stop:
                return
            fewer = range(parts.start, part - 1)
            part = fewer.start + bisect.bisect_left(
                fewer, True, key=lambda p, r=rung: self._fits(layout, r, p)
            )
            yield from self._while_faster([(layout, rung, p) for p in range(part, parts.stop)])
            yield from self._while_faster([(layout, r, part) for r in range(rung, ladder.stop)])

    def _while_faster(self, places: Sequence[tuple[int, int, int]]) -> Iterator[Priced]:
        """Yield the candidates at `places` that fit, up to the first no faster than the one before."""
        seconds = math.inf
        for place in places:
            one = self._at(*place)
            if one.estimate.step_seconds >= seconds:
                return
            seconds = one.estimate.step_seconds
            if one.fits:
                yield one

    def _can_fit(self, layout: int) -> bool:
        """Whether the layout fits on a last rung with the most microbatches or with one."""
        if layout not in self._can:
            # What takes least is mostly that of most microbatches.
            ends = reversed(self._ends(layout))
            self._can[layout] = not self._is_too_much(layout) and any(self._fits(*end) for end in ends)
        return self._can[layout]

    def _is_too_much(self, layout: int) -> bool:
        """Whether the layout takes more than there is whatever it keeps."""
        return self._floor_of(layout) > self._capacity

    def _floor_of(self, layout: int) -> float:
        if self._floor is None:
            return 0.0
        if layout not in self._floors:
            self._floors[layout] = self._floor(self._space.layouts[layout])
        return self._floors[layout]

    def _ends(self, layout: int) -> list[tuple[int, int, int]]:
        """Return the last rungs of a layout, with one microbatch and with the most."""
        parts = dict.fromkeys((0, len(self._space.parts(self._space.layouts[layout])) - 1))
        return [(layout, ladder[-1], part) for part in parts for ladder in reversed(self._ladders(layout))]

    def _smallest(self, layout: int) -> tuple[int, int, int]:
        """Return the smallest of the ends, of equals that of the first ladder."""
        return min(self._ends(layout), key=lambda end: (self._sized(*end), end))

    def _candidate(self, layout: int, remat: int, parts: int) -> Candidate:
        base = self._space.layouts[layout]
        return self._space.remats[remat].on(base, self._space.parts(base)[parts])

    def _fits(self, layout: int, remat: int, parts: int) -> bool:
        return self._sized(layout, remat, parts) <= self._capacity

    def _sized(self, layout: int, remat: int, parts: int) -> float:
        key = (layout, remat, parts)
        if key not in self._sizes:
            self._sizes[key] = self._size(self._candidate(*key))
        return self._sizes[key]

    def _at(self, layout: int, remat: int, parts: int) -> Priced:
        key = (layout, remat, parts)
        if key not in self._seen:
            candidate = self._candidate(*key)
            estimate = self._price(candidate)
            self._sizes[key] = estimate.needed_bytes
            fits = bool(estimate.needed_bytes <= self._capacity)
            self._seen[key] = Priced(candidate=candidate, estimate=estimate, fits=fits)
        return self._seen[key]


def _least_seconds(everything: Estimate) -> float:
    """Return a lower bound on the seconds of a layout, from its Estimate with everything kept."""
    return everything.step_seconds - everything.time.get("kept", 0.0)


def _least(everything: Priced) -> Priced:
    """Return the bound of a layout, from its price with everything kept."""
    estimate = dataclasses.replace(everything.estimate, step_seconds=_least_seconds(everything.estimate))
    return dataclasses.replace(everything, estimate=estimate, bound=True)


def _is_pipeline(layout: Candidate) -> bool:
    return layout.mesh.get("stage", 1) > 1


def stored_bytes(sizes: Mapping[int, int], moments: Mapping[int, float]) -> StoredBytes:
    """Return what says how much of parameters and moments a layout stores on a device.

    `sizes` maps parameter argument index → bytes, `moments` to those of its moments.
    """

    def stored(layout: Candidate) -> float:
        total = 0.0
        for index, size in sizes.items():
            for part, whole in ((layout.stored, size), (layout.optimizer, moments[index])):
                cut = math.prod(layout.mesh[axis] for axes in part[index] for axis in axes)
                total += whole / cut
        return total

    return stored
