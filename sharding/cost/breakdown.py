"""Whose a candidate's memory and seconds are: of which values, and of which lines of the user's code."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from ..program.program import Program
from .candidate import Candidate
from .estimate import Pricer
from .profile import ProgramTables
from .tables import Flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What one line of the user's code takes: bytes or seconds, and the op that takes most of it."""

    where: str
    amount: float
    op: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Breakdown:
    """A candidate's price, taken apart.

    Attributes:
      flat: the program in ops and values, as the tables of its price have it.
      lines: the user's source line of each op.
      held [V]: bytes of each value on a device that are kept for the backward pass.
      worked [V]: bytes of each value on a device while one layer is worked with.
      products, elementwise, again [E]: seconds of each op in a step: as a product, as memory-bound work, and,
        of both, what is run again for the backward pass.
    """

    flat: Flat
    lines: tuple[str, ...]
    held: np.ndarray
    worked: np.ndarray
    products: np.ndarray
    elementwise: np.ndarray
    again: np.ndarray

    def by_line(self, amounts: np.ndarray) -> list[Share]:
        """Return what lines take of `amounts` [E] of ops, the one that takes most first."""
        return _by_line((self.lines[n], float(amounts[n]), n) for n in np.flatnonzero(amounts).tolist())

    def by_line_of_values(self, amounts: np.ndarray) -> list[Share]:
        """Return the same of `amounts` [V] of values, which are of the line that makes them."""
        makers = self.makers
        return _by_line(
            (self.lines[makers[n]], float(amounts[n]), makers[n])
            for n in np.flatnonzero(amounts).tolist()
            if makers[n] >= 0
        )

    @functools.cached_property
    def makers(self) -> Sequence[int]:
        """The op that gives each value; of what a loop hands on, the first that reads it."""
        found = [value.producer for value in self.flat.values]
        for number in range(len(self.flat.ops) - 1, -1, -1):
            for index in self.flat.ops[number].ins:
                if self.flat.values[index].producer < 0:
                    found[index] = number
        return found


def _by_line(rows: Iterable[tuple[str, float, int]]) -> list[Share]:
    total: dict[str, float] = defaultdict(float)
    most: dict[str, tuple[float, int]] = {}
    for where, amount, op in rows:
        total[where] += amount
        most[where] = max(most.get(where, (0.0, op)), (amount, op))
    shares = [Share(where=where, amount=amount, op=most[where][1]) for where, amount in total.items()]
    return sorted(shares, key=lambda one: -one.amount)


def breakdown(program: Program, flat: Flat, pricer: Pricer, candidate: Candidate) -> Breakdown:
    """Take the price of `candidate` apart.

    Args:
      program: the traced program.
      flat: its ops and values as `pricer.profile` was made from.
      pricer: what prices it.
      candidate: what is priced.
    """
    table, placement = pricer.profile, pricer.place(candidate)
    lines = {equation.index: where for equation, where in program.located()}
    kept, weights = pricer.kept(candidate), pricer.worked(placement, candidate.mesh)
    products, elementwise, again = _seconds(table, pricer, candidate, flat)
    return Breakdown(
        flat=flat,
        lines=tuple(lines[op.equation.index] for op in flat.ops),
        held=weights.saved * (1.0 * kept.device + kept.beside),
        worked=table.values.bytes * placement.value_fraction,
        products=products,
        elementwise=elementwise,
        again=again,
    )


def _seconds(
    table: ProgramTables, pricer: Pricer, candidate: Candidate, flat: Flat
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `Breakdown`'s products, elementwise and again; a kernel's seconds are its largest op's."""
    once, kept = pricer.passes(candidate), pricer.kept(candidate)
    parts, count = candidate.microbatches, len(flat.ops)
    rows, steps = table.products, table.steps
    times = (steps.rematted[rows.equation] + 1.0 * kept.again[rows.equation]) * (rows.gradients > 0)
    products, again = np.zeros(count), np.zeros(count)
    np.add.at(again, rows.equation, parts * once.products * times)
    np.add.at(products, rows.equation, parts * (once.products * (1.0 + times) + once.products_back))
    elementwise, groups = np.zeros(count), table.groups
    if len(groups.section):
        leaders = _leaders(flat, groups.of_equation, len(groups.section))
        redone = np.zeros(len(groups.section))
        redone[groups.of_equation[kept.again & (groups.of_equation >= 0)]] = 1.0
        times = groups.rematted + redone
        np.add.at(again, leaders, parts * once.groups * times)
        np.add.at(elementwise, leaders, parts * (once.groups * (1.0 + times) + once.groups_back))
    return products, elementwise, again


def _leaders(flat: Flat, of_equation: np.ndarray, count: int) -> np.ndarray:
    """Return for each kernel the op of it that gives most."""
    found, most = np.zeros(count, int), np.full(count, -1.0)
    for number, group in enumerate(of_equation):
        size = sum(flat.values[index].bytes for index in flat.ops[number].outs)
        if group >= 0 and size > most[group]:
            found[group], most[group] = number, size
    return found
