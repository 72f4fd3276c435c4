"""Stretches of a program that say the same again and again, as layers in a Python loop do.

1. The spine of the program (`graph`) is a sequence of keys; where s[i] == s[i + p] for 2 p or more in a row,
   p may be a period.
2. Of the places where a copy may begin, one where little is alive and many copies fit is taken, so that what
   copies hand on is the stream.
3. Copies whose operands come from the same places (`wiring`) are a repeat; others are cut off.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from jax.extend import core

from ..jaxpr import call_body
from ..primitives import Trait, primitives
from .graph import Graph
from .order import order
from .wiring import Repeat, absorb, cycle_of, earlier, later, wire

_LEAST_COPIES = 2
_POINTWISE, _CALLS = primitives(Trait.ELEMENTWISE), primitives(Trait.CALL)
# Equations with products in all copies together: for fewer a loop's own work is not worth it.
_LEAST_WORK = 4
_LONGEST_PERIOD = 8192
# Beginnings that are looked at, of those where little is alive.
_MOST_CUTS = 8
# Little is alive where no more than this much more is than at the best place.
_LITTLE = 1.5


class Finder:
    """Finds the repeats of a program, those that save most equations first."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.repeats: list[Repeat] = []
        eqns = graph.eqns
        # What has an effect equals nothing.
        keys = [-1 - s if eqns[n].eqn.effects else eqns[n].key for s, n in enumerate(graph.spine)]
        self._keys = np.array(keys, np.int64)
        self._works = np.concatenate([[0], np.cumsum([eqns[n].works for n in graph.spine])])
        self._taken = np.zeros(len(keys) + 1, bool)
        self._heap: list[Any] = []

    def find(self) -> list[Repeat]:
        """Return the repeats."""
        for p in range(1, min(len(self._keys) // 2, _LONGEST_PERIOD) + 1):
            same = self._keys[:-p] == self._keys[p:]
            if np.count_nonzero(same) >= p:
                for a, b in runs(same):
                    self._push(a, b + p, p)
        while self._heap:
            # A candidate promises its length at first; once wired, what it holds, and waits for its turn.
            _, p, a, b, wired = heapq.heappop(self._heap)
            if self._taken[a:b].any():
                for x, y in runs(~self._taken[a:b]):
                    self._push(a + x, a + y, p)
            elif wired is None:
                wired = self._stretch(a, b, p)
                if wired is not None:
                    heapq.heappush(self._heap, (-wired[0][1] * p, p, a, b, wired))
            else:
                self._take(a, b, p, wired)
        return self.repeats

    def _push(self, a: int, b: int, p: int) -> None:
        count = (b - a) // p
        if count >= _LEAST_COPIES and count * (self._works[a + p] - self._works[a]) >= _LEAST_WORK:
            heapq.heappush(self._heap, (-count * p, p, a, b, None))

    def _take(self, a: int, b: int, p: int, wired: list[tuple[int, int]]) -> None:
        """Claim the best of the ways to cut a stretch, and leave the rest of it to others."""
        best: Repeat | None = None
        for first, count in wired:
            # One copy more may be found on either side.
            if best is not None and len(best.copies) * best.spine >= (count + 2) * p:
                continue
            made = self._built(first, p, count)
            if made is not None and (
                best is None or len(made.copies) * made.spine > len(best.copies) * best.spine
            ):
                best = made
            if best is not None and len(best.copies) * best.spine >= (b - a) // p * p:
                break
        if best is None:
            return
        self._claim(best)
        position = self.graph.position
        self._taken[[position[n] for copy in best.copies for n in copy if n in position]] = True
        self._push(a, b, p)

    def _claim(self, made: Repeat) -> None:
        self.graph.owner.update({n: len(self.repeats) for copy in made.copies for n in copy})
        self.repeats.append(made)

    def _give_up(self) -> None:
        for copy in self.repeats.pop().copies:
            for n in copy:
                del self.graph.owner[n]

    # Where copies begin.

    def _stretch(self, a: int, b: int, p: int) -> list[tuple[int, int]] | None:
        """Return where copies may begin and how many fit together, the best place first."""
        live = self._alive(a, b, p)
        rest, count = (b - a) % p, (b - a) // p
        least = live.min()
        parted = self._parted(a, b, p)
        ranked = sorted(range(p), key=lambda f: (live[f] > _LITTLE * least, f > rest, live[f], parted[f], f))
        found: list[tuple[int, int]] = []
        for phase in ranked[:_MOST_CUTS]:
            if found and live[phase] > _LITTLE * least:
                break
            fits = self._fitting(a + phase, p, count - (phase > rest))
            if fits is not None and fits not in found:
                found.append(fits)
        found.sort(key=lambda fits: -fits[1])
        return found or None

    def _alive(self, a: int, b: int, p: int) -> np.ndarray:
        """Return the bytes that are handed over each place [p] between the copies of a stretch."""
        graph = self.graph
        live = np.zeros(3 * p + 1, np.int64)
        for s in range(a, min(a + 2 * p, b)):
            for value in graph.eqns[graph.spine[s]].outs:
                uses = [graph.position[u] for u in graph.users[value] if graph.position[u] - s <= p]
                if uses and max(uses) > s:
                    size = graph.bytes_of(value)
                    live[s - a + 1] += size
                    live[max(uses) - a + 1] -= size
        return np.cumsum(live)[p : 2 * p]

    def _parted(self, a: int, b: int, p: int) -> list[bool]:
        """Return for each place [p] between the copies whether elementwise work goes on over it.

        One kernel would do what comes before and after it, were no border between them.
        """
        graph = self.graph

        def goes_on(border: int) -> bool:
            eqn = graph.eqns[graph.spine[border]]
            makers = [graph.position.get(graph.maker(atom), -1) for atom in eqn.ins]
            before = [s for s in makers if s >= 0]
            last = graph.eqns[graph.spine[border - 1]]
            users = {user for value in last.outs for user in graph.users[value]}
            return (
                before == [border - 1]
                and len(users) == 1
                and _is_pointwise(eqn.eqn)
                and _is_pointwise(last.eqn)
            )

        return [f + a + p < b and goes_on(a + p + f) for f in range(p)]

    def _fitting(self, a: int, p: int, count: int) -> tuple[int, int] | None:
        """Return the longest stretch of copies that are wired alike: its first equation and its copies."""
        if count < _LEAST_COPIES:
            return None
        graph = self.graph
        low, high = graph.start[a], graph.start[a + count * p]
        made, which = graph.made[low:high].reshape(count, -1), graph.which[low:high].reshape(count, -1)
        relative = made - (a + np.arange(count)[:, None] * p)
        best = (0, 0)
        for first in range(count - 1):
            if count - first <= best[1]:
                break
            outside = made < a + first * p
            code = np.where(outside, -1, (relative + p) * 64 + which)
            far, inner = ~outside & (relative < -p), ~outside & (relative >= 0)
            rows = code[first + 1 :]
            good = (rows == rows[0]).all(1) & ~far[first + 1 :].any(1)
            inside, head = inner[first + 1], code[first]
            if not good[0] or not np.where(inside, head == rows[0], head == -1).all():
                continue
            if not ((rows[0] >= 0) & (relative[first + 1] < 0)).any():
                continue
            length = 1 + (len(good) if good.all() else int(np.argmin(good)))
            if length > best[1]:
                best = (first, length)
        return (a + best[0] * p, best[1]) if best[1] >= _LEAST_COPIES else None

    # From a stretch to a repeat.

    def _built(self, a: int, p: int, count: int) -> Repeat | None:
        """Return the repeat of `count` copies from place `a` on, with those that others interrupt."""
        spine = self.graph.spine
        made = self._wired([spine[a + r * p : a + (r + 1) * p] for r in range(count)])
        if made is None:
            return None
        before, after = earlier(self.graph, made), later(self.graph, made)
        for more in ((before, after), (before, []), ([], after)):
            if not (more[0] or more[1]):
                continue
            longer = self._wired([*more[0], *[copy[:p] for copy in made.copies], *more[1]])
            if longer is not None and len(longer.carries) <= len(made.carries):
                made = longer
                break
        return self._in_cycles(made)

    def _in_cycles(self, made: Repeat) -> Repeat | None:
        """Return a repeat as it is, or with as many copies in one as its literals take to come again."""
        length, count = cycle_of(self.graph, made), len(made.copies)
        if length > 1 and count // length >= _LEAST_COPIES:
            p = made.spine
            copies = [copy[:p] for copy in made.copies]
            merged = [
                [n for copy in copies[r : r + length] for n in copy]
                for r in range(0, count - count % length, length)
            ]
            again = self._wired(merged)
            if again is not None:
                made = again
        return made if made.is_chain() and made.is_of_layers(self.graph) else None

    def _wired(self, copies: list[list[int]]) -> Repeat | None:
        """Return copies of equations of the spine as a repeat, if they are alike and can be run as one."""
        spine = len(copies[0])
        if any(n in self.graph.owner for copy in copies for n in copy):
            return None
        wide = [list(copy) for copy in copies]
        absorb(self.graph, wide)
        for one in (wide, copies):
            made = wire(self.graph, one, spine)
            if made is None:
                continue
            self._claim(made)
            runs = order(self.graph, self.repeats) is not None
            self._give_up()
            # Something between two copies may need one and be needed by the other.
            if runs:
                return made
        return None


def _is_pointwise(eqn: core.JaxprEqn) -> bool:
    body = call_body(eqn) if eqn.primitive.name in _CALLS else None
    return eqn.primitive.name in _POINTWISE if body is None else all(map(_is_pointwise, body.jaxpr.eqns))


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return the stretches of True: where each begins and ends."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
