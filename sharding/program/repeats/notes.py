"""What a plan says of layers that are written out: those run as a scan, and those that nearly could be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..lines import line_of
from .find import runs
from .flat import FlatEquation
from .graph import Graph
from .keys import described
from .wiring import Repeat

# Products in stretches that nearly repeat, below which nobody misses a loop.
_LEAST_WORK = 8


def notes_of(graph: Graph, repeats: Sequence[Repeat]) -> list[str]:
    """Return a sentence for all repeats, and one for the longest stretch that nearly repeats."""
    if not repeats:
        return _nearly(graph)
    places: dict[str, list[str]] = {}
    for repeat in repeats:
        work = next(n for n in repeat.copies[0] if graph.eqns[n].works)
        places.setdefault(line_of(graph.eqns[work].eqn), []).append(str(len(repeat.copies)))
    told = ", ".join(f"{' and '.join(counts)} ({where})" for where, counts in places.items())
    return [
        f"layers written out one after another run as scans over their parameters, which are stacked in each "
        f"step unless all share them: {told}; recognise= without 'layers' leaves them as they are written",
        *_nearly(graph),
    ]


def _nearly(graph: Graph) -> list[str]:
    left = [n for n in graph.spine if n not in graph.owner]
    if sum(graph.eqns[n].works for n in left) < _LEAST_WORK:
        return []
    numbers: dict[object, int] = {}
    coarse = np.array([numbers.setdefault(described(graph.eqns[n].eqn), len(numbers)) for n in left])
    best = (0, 0, 0)
    for p in range(1, len(left) // 2 + 1):
        same = coarse[:-p] == coarse[p:]
        if np.count_nonzero(same) < p:
            continue
        a, b = max(runs(same), key=lambda run: run[1] - run[0])
        if b - a >= p and b - a + p > best[0]:
            best = (b - a + p, a, p)
    length, first, p = best
    stretch = [graph.eqns[n] for n in left[first : first + length]]
    if not length or sum(one.works for one in stretch) < _LEAST_WORK:
        return []
    return [
        f"{length // p} stretches at {line_of(stretch[0].eqn)} look alike and are left as they are written: "
        f"{_why(stretch, p)}"
    ]


def _why(stretch: Sequence[FlatEquation], p: int) -> str:
    """Say what keeps copies of `p` equations from being one loop."""
    for one, other in zip(stretch, stretch[p:], strict=False):
        if one.eqn.effects:
            return f"{one.name} ({line_of(one.eqn)}) has an effect outside of the program"
        if one.key != other.key:
            return f"{one.name} ({line_of(one.eqn)}) is not the same in all of them"
    return "they do not hand on to one another, or work with no parameter"
