"""The part of every array and every equation that a device has, and what moves between devices for it.

Each mesh axis is worked out by itself, as if it were the only one. It cuts an array in at most one of its
dims, and an equation in at most one dim of its iteration space (a product has rows, columns and contraction).
An operand that is not cut as its equation is has to be moved, and so has a result. With s the dim in which
the axis cuts the equation ("no s": every device computes all of it) and o the dim in which it cuts the
operand or result ("whole": in none):

====================  =======================  ============================================================
operand               s is a dim of it         it lies as it is needed (s = o), or is exchanged (experts)
operand, cut          s is none of its dims    all-gather; its gradient, a partial sum, is reduce-scattered
operand, cut          no s                     all-gather; its gradient goes back the same way
operand, whole        s is none of its dims    nothing; its gradient is a partial sum: all-reduce
operand, whole        no s                     nothing
result, cut           s is none of its dims    a partial sum: reduce-scatter; all-gather of its gradient
result, whole         s is none of its dims    a partial sum: all-reduce
result                otherwise                nothing: it lies as needed, or each device keeps its part
====================  =======================  ============================================================

So a product that `tensor` cuts at its columns, then one at its rows, is Megatron's pair of an all-reduce
forward and one backward (Shoeybi et al. 2019, section 3), or, with the sequence cut in between, an all-gather
and a reduce-scatter each way (Korthikanti et al. 2022, section 4.2). The traffic of parameters, gathered from
where they are stored and their gradients summed, is not here but in `exchange.py`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..ops.experts import SLACK
from .candidate import Candidate
from .collectives import Link
from .kept import Residuals
from .profile import ProgramTables

_Found = TypeVar("_Found")

FORWARD, BACKWARD = 0, 1
# The kind of a collective, its pass, and the rows of `ProgramTables.values` that move by it.
_Move = tuple[str, int, np.ndarray]

# Experts have room for more rows than an even router gives them: a tile that is not filled for each, of 16 or
# more (`ops.grouped.tile_of`), and of tokens that come from other devices more than the even share.
_TILE_NOT_FILLED = 1 / 16
# Axes over which an array may go from one cut dim to another by an all-to-all, rather than be gathered:
# tokens are cut over `expert` by rows outside of a mixture and by experts inside.
_EXCHANGING = ("expert",)
# What is known of a program's axes and fractions at most.
_MOST_KNOWN = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Traffic:
    """What moves over one mesh axis in one pass: the whole group's bytes per collective, and how often.

    kind is ``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``all_to_all``, phase FORWARD or BACKWARD.
    `values` are rows of `ProgramTables.values`, one for each array that moves; for each, `bytes` is what one
    run moves in a microbatch, `runs` how often it runs there (once for each layer), and `section` whether
    that is before, in or after the layers (`tables.BEFORE`, `LAYERS`, `AFTER`).
    """

    axis: str
    kind: str
    phase: int
    values: np.ndarray
    bytes: np.ndarray
    runs: np.ndarray
    section: np.ndarray
    # By what is kept, and by the link that it goes over.
    _found: dict[object, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @cached_property
    def once(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [3] and numbers of collectives [3] of a microbatch, by section."""
        return self.of(self.runs)

    def under(self, kept: Residuals) -> tuple[np.ndarray, np.ndarray]:
        """Return bytes [3] and numbers of collectives [3] of a microbatch, with what is moved again.

        What is made again in the backward pass is moved again for it.
        """
        if self.phase != FORWARD:
            return self.once
        found = self._found.get(kept)
        if found is None:
            (size, count), again = self.once, kept.gathered if self.kind == "all_gather" else kept.made
            added = self.of(self.runs * again[self.values])
            found = self._found[kept] = size + added[0], count + added[1]
        return found

    def over(self, link: Link, kept: Residuals) -> tuple[np.ndarray, np.ndarray]:
        """Return the seconds [3] that links are busy with a microbatch's, and those of starting them [3]."""
        key = id(link), kept if self.phase == FORWARD else None
        found = self._found.get(key)
        if found is None:
            size, count = self.under(kept)
            seconds = link.transfer(self.kind, size, count), link.starts(self.kind, 1.0) * count
            # The link is kept, so that no other one gets its identity.
            found = self._found[key] = (*seconds, link)
        return found[0], found[1]

    def of(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return bytes [3] and numbers of collectives [3] by section, each value moving `runs` times."""
        size = np.bincount(self.section, weights=self.bytes * runs, minlength=3)
        return size, np.bincount(self.section, weights=runs, minlength=3)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fractions:
    """The part of a program that a device has: one record wherever as many devices cut the same dims.

    So rows over ``data=4, fsdp=2`` are as rows over ``data=8``, and what follows from fractions alone, such
    as the seconds of computing, is found once for both.

    Attributes:
        values: [V], the part of each array of `ProgramTables.values` on a device, in a microbatch.
        roles: [M, 4], the part of each matrix product's batch, left, right and contracted sizes.
        parameters: [P], the part of each parameter that a device computes with, however it is stored.
        traffic: what moves over an axis of some size that cuts some dims, as found so far.
    """

    values: np.ndarray
    roles: np.ndarray
    parameters: np.ndarray
    traffic: dict[object, list[Traffic]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """What a device has of a program, and what moves, under a candidate.

    Attributes:
        candidate: what was laid over the program.
        fractions: the part that a device has of values, products and parameters.
        parameter_partial: axis → [P], whether a parameter's gradient is a partial sum over that axis.
        traffic: one entry for each axis, kind and pass.
    """

    candidate: Candidate
    fractions: Fractions
    parameter_partial: dict[str, np.ndarray]
    traffic: list[Traffic]

    @property
    def value_fraction(self) -> np.ndarray:
        """[V], the part of each array on a device, in a microbatch."""
        return self.fractions.values


def place(profile: ProgramTables, candidate: Candidate) -> Placement:
    """Return what a device has of each array and equation of `profile` under `candidate`, and what moves.

    Of the dims of one array that `candidate.dims` puts on the same mesh axis, the first by
    `ProgramTables.priority` gets it; so it is with the dims of an equation. Where an array and an equation
    that uses it are cut differently, the array moves.
    """
    claims = _claims(profile, candidate)
    fractions = _fractions(profile, candidate, claims)
    sums: dict[str, np.ndarray] = {}
    traffic: list[Traffic] = []
    for axis, dims in claims.items():
        size = candidate.mesh[axis]
        apart = candidate.context is not None and axis == "context"
        # Its size decides on nothing else than what is exchanged.
        key = (axis, dims, size if axis in _EXCHANGING else 0, apart)
        own = _known(profile.along, key, partial(_along, profile, axis, size, dims, apart=apart))
        sums[axis] = own.partial
        key = (axis, dims, size, apart)
        if key not in fractions.traffic:
            found = [_traffic(profile, fractions.values, axis, size, *move) for move in own.moves]
            fractions.traffic[key] = found
        traffic += fractions.traffic[key]
    return Placement(candidate=candidate, fractions=fractions, parameter_partial=sums, traffic=traffic)


def _fractions(
    profile: ProgramTables, candidate: Candidate, claims: Mapping[str, tuple[int, ...]]
) -> Fractions:
    """Return the part that a device has, known from any candidate that cuts the same dims by as much."""
    parts: dict[tuple[int, ...], int] = defaultdict(lambda: 1)
    for axis, dims in claims.items():
        parts[dims] *= candidate.mesh[axis]
    exchanged = any(candidate.mesh.get(axis, 1) > 1 for axis in _EXCHANGING)
    key = (tuple(sorted(parts.items())), candidate.microbatches, exchanged)
    make = partial(_divided, profile, candidate, key[0], exchanged=exchanged)
    return _known(profile.along, key, make)


def _divided(
    profile: ProgramTables,
    candidate: Candidate,
    parts: Sequence[tuple[tuple[int, ...], int]],
    *,
    exchanged: bool,
) -> Fractions:
    """Return what is left of everything once `parts`, dims and into how many they are cut, have cut it."""
    values, products = profile.values, profile.products
    padding = _padding(profile, candidate)
    of_values = _padded(values.dims, padding)
    of_roles = np.ones((len(products.flops), 4))
    of_parameters = _padded(profile.parameters.dims, padding)
    for dims, size in parts:
        cut = _known(profile.along, dims, partial(_cut, profile, dims))
        of_values[cut.values] /= size
        of_roles[cut.roles] /= size
        of_parameters[cut.parameters] /= size
    if profile.batch_dims and candidate.microbatches > 1:
        columns = list(profile.batch_dims)
        of_values[values.dims[:, columns].any(axis=1)] /= candidate.microbatches
        of_roles[products.role_dims[:, :, columns].any(axis=2)] /= candidate.microbatches
    if values.slots.any():
        of_values[values.slots] *= (1.0 + _TILE_NOT_FILLED) * (SLACK if exchanged else 1.0)
    return Fractions(values=of_values, roles=of_roles, parameters=of_parameters)


class _Cut(NamedTuple):
    """Masks of the values [V], roles of products [M, 4] and parameters [P] that an axis over dims cuts."""

    values: np.ndarray
    roles: np.ndarray
    parameters: np.ndarray


def _cut(profile: ProgramTables, dims: Sequence[int]) -> _Cut:
    """Return what an axis cuts that `dims` want, the last of them first."""
    products = profile.products
    # A product shrinks in the role (batch, left, right, contracted) that the dim plays in it.
    won = _winners(profile.steps.space, dims)[products.equation]
    return _Cut(
        values=_winners(profile.values.dims, dims) >= 0,
        roles=(won >= 0)[:, None] & products.role_dims[np.arange(len(won)), :, won],
        parameters=_winners(profile.parameters.dims, dims) >= 0,
    )


class _Along(NamedTuple):
    """What one axis does by itself: a mask of gradients [P] that are partial sums, and what moves."""

    partial: np.ndarray
    moves: list[_Move]


def _along(profile: ProgramTables, axis: str, size: int, dims: Sequence[int], *, apart: bool) -> _Along:
    """Return what an axis of `size` does by itself that `dims` want, the last of them first.

    The cases are those of the table at the top of the module; what attention moves is priced `apart`, see
    `context`. An array that several equations need moved in the same way moves once.
    """
    value_won = _winners(profile.values.dims, dims)
    step_won = _winners(profile.steps.space, dims)
    exchanged_over = size if axis in _EXCHANGING else None
    summed, handing, moves = _for_operands(profile, value_won, step_won, exchanged_over, apart=apart)
    moves += _for_results(profile, value_won, step_won, handing)
    count = len(profile.values.bytes)
    distinct = [(kind, phase, _distinct(chosen, count)) for kind, phase, chosen in moves if len(chosen)]
    return _Along(partial=summed, moves=distinct)


def _traffic(
    profile: ProgramTables,
    fraction: np.ndarray,
    axis: str,
    size: int,
    kind: str,
    phase: int,
    chosen: np.ndarray,
) -> Traffic:
    """Say how much moving the values `chosen` over `axis` is, counting what the group holds together."""
    table = profile.values
    # What is all-reduced is whole on every device; anything else lies in as many parts as the axis has.
    times = 1 if kind == "all_reduce" else size
    return Traffic(
        axis=axis,
        kind=kind,
        phase=phase,
        values=chosen,
        bytes=table.bytes[chosen] * fraction[chosen] * times,
        runs=table.runs[chosen],
        section=table.section[chosen],
    )


def _claims(profile: ProgramTables, candidate: Candidate) -> dict[str, tuple[int, ...]]:
    """Return axis → the dims that want it, the one that goes first by `ProgramTables.priority` at the end."""
    claims: dict[str, list[int]] = {}
    for dim, axes in candidate.dims.items():
        for axis in axes:
            if axis != "stage" and candidate.mesh.get(axis, 1) > 1:
                claims.setdefault(axis, []).append(dim)
    return {axis: tuple(sorted(dims, key=lambda d: -profile.priority[d])) for axis, dims in claims.items()}


def _padding(profile: ProgramTables, candidate: Candidate) -> Mapping[int, float]:
    """Return dim → how many times as large it gets where its axes do not divide it.

    XLA pads a dim of n over p devices to ceil(n / p) p, so that each has ceil(n / p).
    """
    found = {}
    for dim, axes in candidate.dims.items():
        parts = 1
        for axis in axes:
            if axis != "stage":
                parts *= candidate.mesh.get(axis, 1)
        size = profile.dim_sizes[dim]
        if parts > 1 and size % parts:
            found[dim] = float(np.ceil(size / parts) * parts / size)
    return found


def _padded(dims: np.ndarray, padding: Mapping[int, float]) -> np.ndarray:
    times = np.ones(len(dims))
    for dim, more in padding.items():
        times[dims[:, dim]] *= more
    return times


def _winners(table: np.ndarray, claimants: Sequence[int]) -> np.ndarray:
    """Return for each row of dims [N, D] the dim that gets the axis, the last claimant that it has, or -1."""
    won = np.full(len(table), -1)
    for dim in claimants:
        won[table[:, dim]] = dim
    return won


def _smaller_results(profile: ProgramTables, is_weight: np.ndarray, size: int) -> np.ndarray:
    """Return which equations [E] read no parameter and give less than a group of `size` would gather.

    Gathering an operand brings a device n times the part that it has; exchanging the result the part alone.
    """
    count = len(profile.steps.section)
    reads, writes, one = profile.reads, profile.writes, profile.values.bytes
    read = np.bincount(reads.equation, weights=one[reads.value], minlength=count)
    given = np.bincount(writes.equation, weights=one[writes.value], minlength=count)
    weighted = np.bincount(reads.equation[is_weight], minlength=count) > 0
    return ~weighted & (given < read * size)


def _for_operands(
    profile: ProgramTables,
    value_won: np.ndarray,
    step_won: np.ndarray,
    exchanged_over: int | None,
    *,
    apart: bool,
) -> tuple[np.ndarray, np.ndarray, list[_Move]]:
    """Return which parameters' gradients [P] are partial sums, and what moves for equations' operands.

    Between the two stand the equations [E] that rather hand on what they give, over an axis of
    `exchanged_over` devices that values may be exchanged over.
    """
    values, reads = profile.values, profile.reads
    step = step_won[reads.equation]
    own = value_won[reads.value]
    divided = step >= 0
    inside = divided & reads.dims[np.arange(len(step)), step]
    # What hides scores is made of places and ids by who reads it, within a kernel or in plain XLA.
    lying = (own >= 0) & ~(profile.saved.core[reads.value] & ~values.grad[reads.value])
    whole = lying & ~inside & divided
    needs_whole = lying & ~divided
    if apart:
        outside = ~profile.steps.core[reads.equation]
        whole, needs_whole, divided = whole & outside, needs_whole & outside, divided & outside
    parameter = values.parameter[reads.value]
    is_weight = parameter >= 0
    # d(operand) sums over all of the iteration space that the operand lacks: in parts where that is cut.
    summed = divided & ~inside & values.grad[reads.value]
    arguments = profile.parameters.argument
    partial = _among(np.searchsorted(arguments, parameter[summed & is_weight]), len(arguments))
    # An equation without weights may be divided as its operand is, and hand on what it gives instead: tokens
    # go to their experts and come back by all-to-alls (Lepikhin et al. 2020).
    handed = turned = np.zeros(len(step), bool)
    if exchanged_over is not None:
        handed = whole & _smaller_results(profile, is_weight, exchanged_over)[reads.equation]
        # An operand that has the dim, but lies by another one, changes hands itself.
        turned = inside & (own >= 0) & (own != step) & ~is_weight
    gathered = ((whole & ~handed) | needs_whole) & ~is_weight
    moves = [
        ("all_gather", FORWARD, reads.value[gathered]),
        # The transpose of a gather is a scatter of sums. Where every device computed the same, each need only
        # keep its part of the gradient: that is counted as if it were sent, too.
        ("reduce_scatter", BACKWARD, reads.value[gathered & values.grad[reads.value]]),
        ("all_reduce", BACKWARD, reads.value[summed & ~is_weight & (own < 0)]),
        *_exchanged(profile, reads.value[turned]),
    ]
    return partial, _among(reads.equation[handed], len(step_won)), moves


def _for_results(
    profile: ProgramTables, value_won: np.ndarray, step_won: np.ndarray, handing: np.ndarray
) -> list[_Move]:
    """Return what moves for equations' results, those of the equations `handing` [E] by exchange."""
    values, writes = profile.values, profile.writes
    step = step_won[writes.equation]
    own = value_won[writes.value]
    handed = handing[writes.equation]
    summed = (step >= 0) & ~writes.dims[np.arange(len(step)), step] & ~handed
    scattered = writes.value[summed & (own >= 0)]
    return [
        *_exchanged(profile, writes.value[handed]),
        ("all_reduce", FORWARD, writes.value[summed & (own < 0)]),
        ("reduce_scatter", FORWARD, scattered),
        ("all_gather", BACKWARD, scattered[values.grad[scattered]]),
    ]


def _exchanged(profile: ProgramTables, chosen: np.ndarray) -> list[_Move]:
    there = ("all_to_all", FORWARD, chosen)
    return [there, ("all_to_all", BACKWARD, chosen[profile.values.grad[chosen]])]


def _among(places: np.ndarray, count: int) -> np.ndarray:
    """Return which of ``range(count)`` are among `places`."""
    found = np.zeros(count, bool)
    found[places] = True
    return found


def _distinct(places: np.ndarray, count: int) -> np.ndarray:
    """Return each of `places`, which are below `count`, once and in order."""
    return np.flatnonzero(_among(places, count))


def _known(known: dict[object, Any], key: object, make: Callable[[], _Found]) -> _Found:
    """Return what `make` gives, made once under `key`; `known` is emptied where it has become too long."""
    if key not in known:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[key] = make()
    return known[key]
