"""One candidate of a problem taken apart, and what it would cost were the program another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from ..cost.breakdown import Breakdown, breakdown
from ..cost.candidate import Candidate
from ..cost.estimate import Pricer
from ..cost.execution import Execution
from ..cost.kept import Residuals
from ..cost.profile import LAYERS, ProgramTables
from ..cost.tables import Flat, flatten
from ..hardware.topology import Topology
from ..plans.estimate import Estimate
from ..words import gib, seconds
from .declared import Declared
from .inputs import Answer, Problem, Supposing
from .search import Priced, search
from .space import Space


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A candidate of `problem` that is slow, or does not fit the `capacity_bytes` of a device.

    `space` are the layouts near it, among which a supposition looks for its best.
    """

    problem: Problem
    topology: Topology
    declared: Declared
    candidate: Candidate
    estimate: Estimate
    capacity_bytes: float
    room: float
    space: Space

    @property
    def fits(self) -> bool:
        """Whether the candidate fits."""
        return self.estimate.needed_bytes <= self.capacity_bytes

    @functools.cached_property
    def pricer(self) -> Pricer:
        """What prices the candidate."""
        return self.problem.pricer(self.topology, self.declared, self.room).of(self.candidate)

    @property
    def table(self) -> ProgramTables:
        """The tables that it is priced from."""
        return self.pricer.profile

    @functools.cached_property
    def flat(self) -> Flat:
        """The ops and values of the tables."""
        return flatten(self.problem.program, kernels=self.pricer.profile.kernels)

    @functools.cached_property
    def parts(self) -> Breakdown:
        """Whose its memory and seconds are."""
        return breakdown(self.problem.program, self.flat, self.pricer, self.candidate)

    def best(self, supposing: Supposing, memory: float = 1.0) -> tuple[Estimate, bool]:
        """Return what the best near layout would cost, and whether it would fit `memory` times as much."""
        pricer = self.problem.pricer(self.topology, self.declared, self.room, supposing)
        capacity = self.capacity_bytes * memory
        found = search(
            self.space, pricer.price, capacity, size=pricer.needed_bytes, runners_up=0, each_size=False
        )
        one = found.best or found.misfits[0]
        return one.estimate, one.fits

    def gain(self, estimate: Estimate, fits: bool) -> float:
        """Return how many times as fast, or as small, `estimate` is; endless where it fits at last."""
        if fits and not self.fits:
            return np.inf
        if not fits:
            return 0.0 if self.fits else self.estimate.needed_bytes / estimate.needed_bytes
        return self.estimate.step_seconds / estimate.step_seconds

    def in_words(self, estimate: Estimate, fits: bool) -> str:
        """Say what would be won."""
        if not fits:
            return f"{gib(estimate.needed_bytes)} would be needed"
        took = f"{seconds(estimate.step_seconds)} a step"
        if not self.fits:
            return f"it would fit, {took}, MFU {estimate.mfu:.1%}"
        return f"{took} instead of {seconds(self.estimate.step_seconds)}, MFU {estimate.mfu:.1%}"


def together(supposed: Sequence[Supposing]) -> Supposing:
    """Suppose all at once."""

    def tables(table: ProgramTables) -> ProgramTables:
        return functools.reduce(lambda found, one: one.tables(found), supposed, table)

    def execution(own: Execution) -> Execution:
        return functools.reduce(lambda found, one: one.execution(found), supposed, own)

    dtype = next((one.dtype for one in supposed if one.dtype), None)
    return Supposing(tables=tables, execution=execution, dtype=dtype, attention=_attention(supposed))


def _attention(supposed: Sequence[Supposing]) -> str | None:
    return next((one.attention for one in supposed if one.attention), None)


def case_of(problem: Problem, topology: Topology, declared: Declared, answer: Answer, chosen: Priced) -> Case:
    """Return the case of one candidate of a search, with the layouts that the search looked at near it."""
    found, layouts = answer.found, list(answer.space.layouts)
    own = {
        (id(one.candidate.dims), id(one.candidate.stored), id(one.candidate.optimizer))
        for one in (chosen, *found.others, *found.misfits)
    }
    if chosen.fits:
        layouts = [one for one in layouts if (id(one.dims), id(one.stored), id(one.optimizer)) in own]
    return Case(
        problem=problem,
        topology=topology,
        declared=declared,
        candidate=chosen.candidate,
        estimate=chosen.estimate,
        capacity_bytes=answer.capacity_bytes,
        room=answer.room,
        space=dataclasses.replace(answer.space, layouts=tuple(layouts)),
    )


def lighter(own: ProgramTables, mask: np.ndarray, times: float) -> Callable[[ProgramTables], ProgramTables]:
    """Suppose that the values of a mask [V] over `own` tables have so many times their bytes."""

    def tables(table: ProgramTables) -> ProgramTables:
        # A change of it shares its steps.
        if table.steps is not own.steps:
            return table
        size = np.where(mask, times * table.values.bytes, table.values.bytes)
        return dataclasses.replace(table, values=dataclasses.replace(table.values, bytes=size))

    return tables


def in_parts(own: ProgramTables, mask: np.ndarray, parts: int, made_by: Sequence[int]) -> Supposing:
    """Suppose that the values of a mask [V] over `own` tables are worked through in so many parts.

    One part lies in memory at a time. As much is read and written as before, and the ops of the numbers
    `made_by` run again, since the backward pass makes each part anew.
    """
    smaller = lighter(own, mask, 1 / parts)

    def tables(table: ProgramTables) -> ProgramTables:
        if table.steps is not own.steps:
            return table
        groups = table.groups
        times = np.where(mask, parts, 1.0)[groups.edge_value]
        forward, backward = groups.edge_forward * times, groups.edge_backward * times
        as_much = dataclasses.replace(groups, edge_forward=forward, edge_backward=backward)
        return dataclasses.replace(smaller(table), groups=as_much)

    def again(table: ProgramTables, found: Residuals) -> Residuals:
        made = np.isin(np.arange(len(found.again)), made_by) & ~table.steps.rematted
        return dataclasses.replace(found, again=found.again | made)

    def execution(own: Execution) -> Execution:
        return _keeping(own, again)

    return Supposing(tables=tables, execution=execution)


def more_rows(times: float) -> Callable[[ProgramTables], ProgramTables]:
    """Suppose a batch of so many times the rows."""

    def tables(table: ProgramTables) -> ProgramTables:
        dims = list(table.batch_dims)
        rows = table.values.dims[:, dims].any(axis=1)
        roles = table.products.role_dims[:, :, dims].any(axis=2)
        grown = np.where(roles, times, 1.0)
        sizes = table.dim_sizes.copy()
        sizes[dims[:1]] *= times
        return dataclasses.replace(
            table,
            dim_sizes=sizes,
            values=dataclasses.replace(table.values, bytes=table.values.bytes * np.where(rows, times, 1.0)),
            products=dataclasses.replace(
                table.products,
                flops=table.products.flops * grown.max(axis=1, initial=1.0),
                role_sizes=table.products.role_sizes * grown,
            ),
        )

    return tables


def checkpointed(share: float) -> Supposing:
    """Suppose that of what is kept outside of layers so much stays, and all of it is run again."""

    def less(table: ProgramTables, found: Residuals) -> Residuals:
        mask, outside = table.values.section != LAYERS, table.steps.section != LAYERS
        again = found.again | (outside & ~table.steps.rematted)
        device = np.where(mask, share * found.device, 1.0 * found.device)
        return dataclasses.replace(found, device=device, again=again)

    def execution(own: Execution) -> Execution:
        return _keeping(own, less)

    return Supposing(execution=execution)


def _keeping(own: Execution, change: Callable[[ProgramTables, Residuals], Residuals]) -> Execution:
    """Suppose that something else is kept, made once of what is: what follows from it is known by it."""
    known: dict[object, Residuals] = {}

    def kept(table: ProgramTables, candidate: Candidate, fused: bool) -> Residuals:
        found = own.kept(table, candidate, fused)
        if (table, found) not in known:
            known[table, found] = change(table, found)
        return known[table, found]

    return dataclasses.replace(own, kept=kept)
