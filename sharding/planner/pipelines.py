"""Stages in the search: a pipeline is taken where it is faster than whatever else fits, and runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax

from ..cost.candidate import Candidate
from ..cost.estimate import Pricer
from ..cost.pipeline import Least, Lockstep, held_at_least
from ..cost.profile import ProgramTables
from ..errors import UserError
from ..hardware.topology import Topology
from ..ops import cudnn
from ..plans.record import Record
from ..plans.vocabulary import stages_in_words
from ..program.dims import batch_rows
from ..transform.compose import PlannedLoss
from ..verify.export import abstract_mesh
from ..words import seconds
from .choices.layers import STAGE, Layers, layers_of
from .choices.microbatches import divisors
from .choices.stages import CHUNKS, ways_of, why_whole
from .declared import Declared
from .inputs import ROOMS, Answer, Problem
from .search import Found, Priced, anything_fits, search

# A pipeline is taken if it needs at most this share of the seconds of the best without: what is as fast
# either way stays what it is.
_WORTH = 0.98
# Layouts that only differ in which axis of light traffic cuts their rows take the same seconds at least, to
# this share of them: the first one's tell of the others.
_ALIKE = 1.02


def with_stages(problem: Problem, topology: Topology, declared: Declared, answer: Answer) -> Answer:
    """Return the search over meshes with ``stage`` where its best is worth it, else `answer` itself.

    `answer` is the search without. Stages are offered where nothing is declared of them or of their schedule,
    layers are found, and the chip is a real one. Sizes are tried in the order of what they take at least,
    until that is no less than the best known.
    """
    layers = layers_of(problem.program)
    if not _are_offered(problem, topology, declared, layers):
        return answer
    assert layers is not None
    pricer = problem.pricer(topology, declared, answer.room)
    best = answer.found.best
    below = math.inf if best is None else _WORTH * best.estimate.step_seconds
    keeps = any(policy.over_ticks for policy in answer.space.remats)
    work = _Work.of(pricer, layers.count, batch_rows(problem.program), keeps=keeps)
    found = answer
    sizes = [one for one in _sizes(topology, declared, layers) if work.at_least(one) < below]
    if not sizes or problem.accumulation(declared).why_not(2) is not None:
        return answer
    for stages in sorted(sizes, key=work.at_least):
        if work.at_least(stages) >= below:
            break
        other = _solved(problem, topology, declared, stages, work, below, found)
        if other is not None and other.found.best is not None:
            found, below = other, other.found.best.estimate.step_seconds
    return found if found is answer else _joined(found, answer)


def why_not_run(problem: Problem, plan: Record) -> str | None:
    """Return why a plan's loss does not go through its stages, None if it does: it is traced, not run."""
    try:
        planned = PlannedLoss(plan, problem.loss, abstract_mesh(plan))
        # The kernels are those of the plan's devices, which need not be here.
        with cudnn.described():
            jax.eval_shape(planned.value_and_grad, *problem.args)
    except UserError as error:
        return str(error)
    return None


def ways_in_words(
    problem: Problem, topology: Topology, declared: Declared, answer: Answer, chosen: Priced
) -> tuple[str, ...]:
    """Say how a plan's stages work, and what each other way to work the same ones would take."""
    own, space = chosen.candidate, answer.space
    whole = why_whole(topology, own.mesh) if own.mesh.get(STAGE, 1) > 1 else None
    if whole is not None:
        return (f"stages work in {_way(own)}: {whole}",)
    others = [
        one
        for one in space.layouts
        if one.dims is own.dims and one.stored is own.stored and one.optimizer is own.optimizer
    ]
    others = [one for one in others if _way(one) != _way(own)]
    if own.mesh.get(STAGE, 1) == 1 or not others:
        return ()
    pricer, told = problem.pricer(topology, declared, answer.room), []
    for one in others:
        alone = dataclasses.replace(space, layouts=(one,))
        found = search(
            alone, pricer.price, answer.capacity_bytes, size=pricer.needed_bytes, each_size=False
        ).best
        if found is None:
            told.append(f"{_way(one)} does not fit")
            continue
        longer = found.estimate.step_seconds / chosen.estimate.step_seconds - 1
        told.append(f"{_way(one)} would take {seconds(found.estimate.step_seconds)}, {longer:+.1%}")
    return (f"stages work in {_way(own)}: {'; '.join(told)}",)


def _way(layout: Candidate) -> str:
    words = stages_in_words(layout.schedule, layout.interleave, layout.stage_remat)
    return f"{words}, run again" if layout.stage_remat else words


def _are_offered(problem: Problem, topology: Topology, declared: Declared, layers: Layers | None) -> bool:
    said = STAGE in declared.mesh or -1 in declared.mesh.values()
    said = said or declared.schedule is not None or declared.interleave is not None
    return not (said or topology.chip.nominal or layers is None)


def _sizes(topology: Topology, declared: Declared, layers: Layers) -> Iterator[int]:
    """Yield the numbers of stages that what is declared leaves devices for."""
    free, left = divmod(topology.num_devices, math.prod(declared.mesh.values()))
    for stages in () if left else divisors(free):
        if 1 < stages <= layers.count:
            yield stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """Seconds of a step shared out evenly, nothing sent: of the layers' work and all else, on one device."""

    profile: ProgramTables
    alone: Least
    devices: int
    count: int
    rows: int

    @classmethod
    def of(cls, pricer: Pricer, count: int, rows: int, *, keeps: bool) -> _Work:
        alone = pricer.whole(Candidate(mesh={}, dims={}, stage_remat=not keeps))
        devices = pricer.topology.num_devices
        return cls(profile=pricer.profile, alone=alone, devices=devices, count=count, rows=rows)

    def at_least(self, stages: int) -> float:
        """Return the seconds that any pipeline of so many stages takes at least."""
        most = max(self.rows // math.gcd(self.rows, stages), 1)
        chunks = [chunks for chunks in CHUNKS if stages * chunks <= self.count]
        return min(self.over(stages, one, most) for one in chunks)

    def over(self, stages: int, chunks: int, microbatches: int) -> float:
        """Return the seconds that a pipeline takes at least in so many microbatches or fewer."""
        each = {"stages": stages, "chunks": chunks, "microbatches": microbatches}
        ticks = [Lockstep(**each, delayed=delayed) for delayed in (False, True)]
        return min(self.alone.over(self.profile, one) for one in ticks) * stages / self.devices


def _solved(
    problem: Problem,
    topology: Topology,
    declared: Declared,
    stages: int,
    work: _Work,
    below: float,
    known: Answer,
) -> Answer | None:
    """Return what so many stages can do in fewer seconds than `below`, in the memory that was `known`."""
    declared = dataclasses.replace(declared, mesh={**declared.mesh, STAGE: stages})
    pricer, capacity = problem.pricer(topology, declared, known.room), known.capacity_bytes
    keeps = any(policy.over_ticks for policy in known.space.remats)
    least: dict[object, float] = {}

    def worth(layout: Candidate, microbatches: Sequence[int]) -> bool:
        most = dataclasses.replace(layout, microbatches=microbatches[-1])
        shared = work.over(stages, most.interleave, most.microbatches)
        if shared >= below:
            return False
        if held_at_least(pricer.profile, most, pricer.slot_bytes) > capacity:
            return False
        if below == math.inf:
            return True
        key = _as_one(most)
        if least.get(key, 0.0) >= _ALIKE * below:
            return False
        # Computing never takes less than shared out evenly, and what is exchanged comes on top of it.
        found = shared + pricer.exchanged(most)
        if found < below:
            ways = ways_of(declared, topology, layout.mesh, keeps=keeps)
            each = (dataclasses.replace(most, schedule=one, stage_remat=again) for one, again in ways)
            found = min(map(pricer.least, each))
        least.setdefault(key, found)
        return found < below

    try:
        offered = problem.space(topology, declared, worth)
    except UserError:
        return None
    if below == math.inf and not anything_fits(offered, capacity, pricer.needed_bytes, pricer.least_bytes):
        return None
    answer = None
    for share in (one for one in ROOMS if one >= known.room):
        pricer = problem.pricer(topology, declared, share)
        found = search(
            offered,
            pricer.price,
            capacity,
            size=pricer.needed_bytes,
            least=pricer.least,
            floor=pricer.least_bytes,
            each_size=False,
            below=below,
        )
        answer = Answer(
            program=problem.program,
            space=offered,
            found=found,
            capacity_bytes=capacity,
            stored=None,
            room=share,
        )
        if found.best is not None:
            break
    return answer


def _as_one(layout: Candidate) -> object:
    """Return what layouts share that cut their rows over as many devices, whether by data or fsdp."""
    rows = {axis: layout.mesh.get(axis, 1) for axis in ("data", "fsdp")}
    dims = (
        (dim, tuple(axis for axis in axes if axis not in rows), rows.keys().isdisjoint(axes))
        for dim, axes in layout.dims.items()
    )
    mesh = {axis: size for axis, size in layout.mesh.items() if axis not in rows and size > 1}
    return math.prod(rows.values()), tuple(mesh.items()), frozenset(dims), layout.interleave


def _joined(found: Answer, without: Answer) -> Answer:
    """Return the search over stages with what was found without them among its alternatives."""
    others: list[Priced] = [one for one in (without.found.best, *without.found.others) if one is not None]
    both = sorted((*found.found.others, *others), key=lambda one: one.estimate.step_seconds)
    joined = Found(
        best=found.found.best,
        others=tuple(both),
        misfits=without.found.misfits,
        priced=found.found.priced + without.found.priced,
    )
    refused = {**without.space.refused, **found.space.refused}
    return dataclasses.replace(found, found=joined, space=dataclasses.replace(found.space, refused=refused))
