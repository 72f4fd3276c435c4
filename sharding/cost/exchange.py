"""Seconds that parameters and gradients travel: gathers at use, reductions, the optimizer's shares."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..hardware.axes import AXES_BY_WEIGHT
from ..program.lookups import MANY_ROWS
from .candidate import Candidate, Storage
from .collectives import Link
from .placement import Placement
from .profile import ProgramTables, TableLookup


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredOver:
    """The mesh axes that each parameter [P] lies over, by what is stored; `stage` does not count.

    parameters, gradients, optimizer: at rest; computed: where it is computed with. `read_there` are tables
    that are read where they are stored, each with the axes that its columns are cut over.
    """

    parameters: list[frozenset[str]]
    gradients: list[frozenset[str]]
    optimizer: list[frozenset[str]]
    computed: list[frozenset[str]]
    read_there: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def stored_over(
    profile: ProgramTables, candidate: Candidate, read_there: Mapping[int, tuple[str, ...]]
) -> StoredOver:
    """Return the mesh axes that parameters, gradients and moments lie over; see `tables_read_there`."""
    computed, parameters, gradients, optimizer = [], [], [], []
    mesh = candidate.mesh
    dims_of = candidate.dims
    cut = frozenset(axis for axis, size in mesh.items() if size > 1 and axis != "stage")

    def axes(spec: Storage | None, default: frozenset[str]) -> frozenset[str]:
        if spec is None:
            return default
        return _axes_of(spec, cut)

    # Many parameters are stored alike, by one tuple for all of them.
    alike: dict[object, tuple[frozenset[str], ...]] = {}
    cutting = {dim: own for dim, axes in dims_of.items() if (own := cut.intersection(axes))}
    arguments = profile.parameters.argument.tolist()
    specs = (map(of.get, arguments) for of in (candidate.stored, candidate.gradients, candidate.optimizer))
    for dims, stored, gradient, moments in zip(profile.parameter_dims, *specs, strict=True):
        key = (dims, id(stored), id(gradient), id(moments))
        found = alike.get(key)
        if found is None:
            here = frozenset().union(*(cutting[dim] for dim in dims if dim in cutting))
            kept = axes(stored, here)
            found = alike[key] = (here, kept, axes(gradient, kept), axes(moments, kept))
        computed.append(found[0])
        parameters.append(found[1])
        gradients.append(found[2])
        optimizer.append(found[3])
    for n in read_there:
        computed[n] = parameters[n]
    return StoredOver(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        computed=computed,
        read_there=read_there,
    )


@functools.lru_cache(maxsize=1 << 16)
def _axes_of(spec: Storage, among: frozenset[str]) -> frozenset[str]:
    return among.intersection(axis for entry in spec for axis in entry)


def tables_read_there(
    profile: ProgramTables, placement: Placement, candidate: Candidate
) -> dict[int, tuple[str, ...]]:
    """Return the tables that a step reads where they are stored, as `transform.lookup` does, and over what.

    Those with many rows for each that a device looks up, whose columns are stored over axes that cut the ids.
    """
    found = {}
    for n, lookups in profile.parameters.lookups.items():
        axes = _columns(profile, candidate, n)
        if axes and all(_stays(profile, placement, candidate, n, axes, one) for one in lookups):
            found[n] = axes
    return found


def _columns(profile: ProgramTables, candidate: Candidate, n: int) -> tuple[str, ...]:
    """Return the axes that the columns of a table are stored over more than they are computed with."""
    dims, spec = profile.parameter_dims[n], candidate.stored.get(int(profile.parameters.argument[n]))
    if spec is None or len(dims) != len(spec):
        return ()
    stored = [_cutting(candidate, axes) for axes in spec]
    used = [_cutting(candidate, candidate.dims.get(dim, ())) for dim in dims]
    cut = [place for place in range(len(spec)) if stored[place] != used[place]]
    if len(cut) != 1 or stored[0] or used[0]:
        return ()
    more = stored[cut[0]][len(used[cut[0]]) :]
    return more if stored[cut[0]] == used[cut[0]] + more else ()


def _stays(
    profile: ProgramTables,
    placement: Placement,
    candidate: Candidate,
    n: int,
    axes: tuple[str, ...],
    one: TableLookup,
) -> bool:
    of_ids = np.flatnonzero(profile.values.dims[one.ids]).tolist()
    own = {axis for dim in of_ids for axis in _cutting(candidate, candidate.dims.get(dim, ()))}
    used = {axis for dim in profile.parameter_dims[n] for axis in candidate.dims.get(dim, ())}
    few = one.count * placement.value_fraction[one.ids] * MANY_ROWS <= one.rows
    return bool(few) and own.issuperset(axes) and own.isdisjoint(used)


def _cutting(candidate: Candidate, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if candidate.mesh.get(axis, 1) > 1)


def parts(axes: list[frozenset[str]], mesh: Mapping[str, int]) -> np.ndarray:
    """Return over how many devices each parameter [P] lies."""
    known: dict[frozenset[str], float] = {}
    for one in axes:
        if one not in known:
            known[one] = float(math.prod(mesh[axis] for axis in one))
    return np.array([known[one] for one in axes], float)


class _Alike(NamedTuple):
    """Mesh axes that parameters which travel alike have in common.

    gather: over which they are gathered when used; reduce: over which their gradients are partial sums;
    gradients, moments: over which these are stored; renewed: over which new parameters are gathered, each
    device having made its part. Those of one scan over layers travel together.
    """

    section: int
    stack: int
    gather: tuple[str, ...]
    reduce: tuple[str, ...]
    gradients: frozenset[str]
    moments: frozenset[str]
    renewed: frozenset[str]


@dataclasses.dataclass(kw_only=True)
class Exchange:
    """Seconds by (collective, mesh axis) and section, were one device's stage to hold all layers.

    gathers: of parameters, once for a pass of a microbatch; scatters: reductions of gradients, once for a
    microbatch; step: reductions of gradients and gathers of new parameters, once for a step.
    """

    gathers: dict[tuple[str, str], list[float]]
    scatters: dict[tuple[str, str], list[float]]
    step: dict[tuple[str, str], list[float]]


def exchange(
    profile: ProgramTables,
    placement: Placement,
    candidate: Candidate,
    over: StoredOver,
    links: Mapping[str, Link],
    gradient_bytes: float | None,
    *,
    joint: Callable[[Sequence[str]], Link] | None = None,
    renews_alone: bool = False,
) -> Exchange:
    """Return how long parameters and gradients travel.

    A parameter stored over more axes than it is computed with is gathered for the forward and again for the
    backward pass, in the type that it is used in. A gradient that is a partial sum over an axis is scattered
    over it each microbatch where gradients are stored so, and reduced once a step where they are not, or, if
    there is a `joint` link, each microbatch over all axes at once where there are several. An optimizer that
    shares the work out (ZeRO-1, Rajbhandari et al. 2020) scatters instead of reducing, and gathers the new
    parameters.

    Args:
      profile: the program's tables.
      placement: the parts that devices compute with, and which gradients are partial sums.
      candidate: its mesh.
      over: the axes that parameters, gradients and moments lie over.
      links: axis → what it runs on.
      gradient_bytes: of one element as it travels; as the parameter's in use if None.
      joint: axes → what a group over all of them runs on, for gradients that are reduced whole, see
        `Execution.reduces_whole`.
      renews_alone: whether new parameters are gathered by themselves where gradients are stored in parts too.
    """
    found = Exchange(gathers=_table(), scatters=_table(), step=_table())
    table = profile.parameters
    elements = (table.elements * placement.fractions.parameters).tolist()
    item_bytes, used_bytes = table.item_bytes.tolist(), table.used_bytes.tolist()
    sections, runs, stacks = table.section.tolist(), table.runs.tolist(), table.stack.tolist()
    trained, read = table.trained.tolist(), table.read.tolist()
    plans: dict[_Alike, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    ordered = sorted(placement.parameter_partial.items(), key=lambda pair: AXES_BY_WEIGHT.index(pair[0]))
    sums = _partial_sums([(axis, mask) for axis, mask in ordered], len(elements))
    # Many parameters lie alike.
    known: dict[object, list[float]] = {}
    for n, count in enumerate(elements):
        summed = sums[n] if trained[n] else ()
        if there := over.read_there.get(n, ()):
            # Each device has the whole gradient of its own columns from those that its rows went to.
            summed = tuple(axis for axis in summed if axis not in there)
            count /= math.prod(candidate.mesh[axis] for axis in there)
        lying = over.parameters[n], over.computed[n], over.optimizer[n], over.gradients[n]
        key = (sections[n], stacks[n], read[n], trained[n], summed, *map(id, lying))
        row = known.get(key)
        if row is None:
            alike = _alike(
                sections[n], stacks[n], read[n], trained[n], summed, lying, joint is not None or renews_alone
            )
            row = known[key] = plans[alike]
        row[0] += count * item_bytes[n]
        row[1] += count * (used_bytes[n] if gradient_bytes is None else gradient_bytes)
        # Parameters of a layer are gathered and reduced together: as many collectives as layers.
        row[2] = max(row[2], runs[n])
        row[3] += count * used_bytes[n]
    for n, axes in over.read_there.items():
        _send_rows(found.gathers, links, profile, placement, n, axes)
    for alike, (size, gradient, times, used) in plans.items():
        _gather(found.gathers, links, candidate.mesh, alike, used, times)
        _reduce(found, links, candidate.mesh, alike, size, gradient, times, joint)
    return found


def _partial_sums(partial: list[tuple[str, np.ndarray]], count: int) -> list[tuple[str, ...]]:
    """Return of each of so many parameters the axes that its gradient is a partial sum over."""
    codes = np.zeros(count, int)
    for place, (_, mask) in enumerate(partial):
        codes[mask] |= 1 << place
    axes = tuple(axis for axis, _ in partial)
    return [_chosen(axes, code) for code in codes.tolist()]


@functools.lru_cache(maxsize=1 << 12)
def _chosen(axes: tuple[str, ...], code: int) -> tuple[str, ...]:
    """Return those of `axes` whose bits are set in `code`."""
    return tuple(axis for place, axis in enumerate(axes) if code >> place & 1)


def _alike(
    section: int,
    stack: int,
    read: bool,
    trained: bool,
    reduce: tuple[str, ...],
    lying: tuple[frozenset[str], frozenset[str], frozenset[str], frozenset[str]],
    renews_alone: bool,
) -> _Alike:
    """Return how a parameter travels that lies so: itself, where it is computed with, moments, gradients."""
    parameter, computed, moments, gradients = lying
    moved = parameter - computed if read else frozenset()
    # Where gradients are stored in parts too (ZeRO-2), new parameters are gathered beside the next forward
    # pass, which hides it; reduced whole, gradients are not, and the gather shows, as where all wait for one.
    renewed = moments - parameter - (frozenset() if renews_alone else gradients)
    gather = tuple(sorted(moved, key=AXES_BY_WEIGHT.index))
    renewed = renewed if trained else frozenset()
    return _Alike(section, stack, gather, reduce, gradients, moments, renewed)


def _table() -> dict[tuple[str, str], list[float]]:
    return defaultdict(lambda: [0.0, 0.0, 0.0])


def _gather(
    into: dict[tuple[str, str], list[float]],
    links: Mapping[str, Link],
    mesh: Mapping[str, int],
    alike: _Alike,
    size: float,
    times: float,
) -> None:
    """Add gathering `size` bytes axis by axis.

    The lightest axis, of the slowest links, goes first, while a group's part of the array is small:
    size / (product of the axes still to come). The last one gathers all of it.
    """
    left = math.prod(mesh[axis] for axis in alike.gather)
    for axis in alike.gather:
        left //= mesh[axis]
        into["all_gather", axis][alike.section] += links[axis].collective("all_gather", size / left, times)


def _send_rows(
    into: dict[tuple[str, str], list[float]],
    links: Mapping[str, Link],
    profile: ProgramTables,
    placement: Placement,
    n: int,
    axes: tuple[str, ...],
) -> None:
    """Add sending the ids of a table's look-ups to all of its columns, and the rows that they name back.

    The gradient goes the way of the rows, so that a backward pass takes as long. An exchange over several
    axes is one over each, a group holding what its devices' own ids name.
    """
    section = int(profile.parameters.section[n])
    for one in profile.parameters.lookups[n]:
        ids = float(profile.values.bytes[one.ids] * placement.value_fraction[one.ids])
        rows = float(profile.values.bytes[one.out] * placement.value_fraction[one.out])
        for axis in axes:
            size = links[axis].size
            ids *= size
            into["all_gather", axis][section] += links[axis].collective("all_gather", ids)
            into["all_to_all", axis][section] += links[axis].collective("all_to_all", rows * size)


def _reduce(
    found: Exchange,
    links: Mapping[str, Link],
    mesh: Mapping[str, int],
    alike: _Alike,
    size: float,
    gradient: float,
    times: float,
    joint: Callable[[Sequence[str]], Link] | None,
) -> None:
    """Add reducing `gradient` bytes over all axes that it is a partial sum over, and renewing the parameters.

    Over several axes at once it is one all-reduce of all their devices, said of the first. Else the heaviest
    axis, of the fastest links, goes first: a scatter over n devices leaves 1 / n of the array to the axes
    after it, an all-reduce all of it.
    """
    share, section = 1.0, alike.section
    whole = joint is not None and len(alike.reduce) > 1
    if joint is not None and whole:
        seconds = joint(alike.reduce).collective("all_reduce", gradient, times)
        found.scatters["all_reduce", next(iter(alike.reduce))][section] += seconds
    late = [axis for axis in alike.reduce if axis not in alike.gradients]
    early = [axis for axis in alike.reduce if axis in alike.gradients]
    for axis in (*reversed(early), *reversed(late)):
        link, scattered = links[axis], axis in alike.gradients or axis in alike.moments
        if not whole:
            kind = "reduce_scatter" if scattered else "all_reduce"
            into, count = (found.scatters, times) if axis in alike.gradients else (found.step, 1.0)
            into[kind, axis][section] += link.collective(kind, gradient * share, count)
        if axis in alike.renewed:
            found.step["all_gather", axis][section] += link.collective("all_gather", size * share)
        if whole or scattered:
            share /= mesh[axis]
