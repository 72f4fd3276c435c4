"""Plans that come out of the planner: the best of a search, or the one that was declared."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from typing import Any

from ..cost.candidate import Candidate
from ..cost.context import site_of
from ..cost.estimate import Pricer
from ..errors import UserError
from ..hardware.topology import Topology
from ..plans.estimate import Estimate
from ..plans.record import Record
from ..plans.vocabulary import DELAYED
from ..program.mixtures import experts_dims
from ..program.program import Program
from ..words import gib, layout_in_words, seconds
from ..xla.compiler import compiler_of
from . import build, reserve, sequences
from .advice import nothing_fits
from .choices import arithmetic, context, experts
from .choices.attention import Chosen
from .choices.remat import check_names
from .choices.storage import state_storage
from .declared import Declared, ruled
from .inputs import ROOMS, Answer, Problem, capacity_of
from .obstacles import notes_on
from .pipelines import ways_in_words, why_not_run, with_stages
from .search import Priced
from .space import checked_remat, only
from .supposing import Case, case_of
from .unnamed import with_unnamed

# How many of the layouts that do not fit a plan tells of.
_MISFITS_SHOWN = 3
# Layers are priced as they are written too where stacks of their parameters take this share of a step, unless
# more parameters than that are stacked: it takes as long again as planning did.
_STACKS, _MOST_STACKED = 0.04, 256
# Said of a plan that fits only by less than the usual room.
_TIGHT = (
    "it fits only if the compiler leaves less memory free between arrays than it usually does: "
    "have it compiled (--verify) before it is booked"
)
# Said of a faster one that fits only so.
_TRIED_FIRST = "--verify compiles it first, and takes it if it fits"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What a plan came out of, for who asks further: the next best, or the best in less memory.

    `nearly` has as its best a faster plan that only a compiler can say of whether it fits.
    """

    problem: Problem
    topology: Topology
    declared: Declared
    answer: Answer
    nearly: Search | None = None

    def plan(self, chosen: Priced) -> Record:
        """Return `chosen`, one of what was found, as a plan; all else that was found are its alternatives."""
        answer = self.answer
        program, layout = answer.program, chosen.candidate
        found = (answer.found.best, *answer.found.others, *answer.found.misfits[:_MISFITS_SHOWN])
        others = [one for one in found if one is not None and one is not chosen]
        kernel = self.problem.kernel(self.topology, self.declared)
        kernels, of_experts = _kernels(self.problem, self.topology, self.declared, kernel, layout)
        notes = (
            build.notes_of(program, self.topology, layout)
            + build.notes_of_rows(program, layout)
            + build.notes_on_sharing(layout)
            + _notes_on(self.problem, kernel, layout)
            + of_experts
        )
        notes += sequences.notes_on(program, layout)
        notes += context.notes_on(self.problem.attention, layout, kernel)
        notes += _notes_on_experts(program, layout)
        notes += ways_in_words(self.problem, self.topology, self.declared, answer, chosen)
        if answer.room < 1.0 and chosen.fits:
            notes += (_TIGHT,)
        case = self._case(chosen)
        return build.record_of(
            program,
            self.topology,
            layout,
            notes=notes
            + self.problem.notes(self.topology, layout)
            + self.problem.accumulation(self.declared).notes(layout.microbatches)
            + notes_on(case)
            + reserve.notes_on(case),
            estimate=chosen.estimate,
            alternatives=build.alternatives_of(program, chosen, others, answer.capacity_bytes, answer.stored),
            refused=answer.space.refused,
            compiler_options=reserve.options_of(self.topology, chosen.estimate),
            kernels=kernels,
            recognise=self.problem.recognise,
            calibration=digest_of(self.problem),
            accumulation=self.declared.accumulation,
            state=None if self.problem.state is None else build.state_of(program, layout),
        )

    def _case(self, chosen: Priced) -> Case:
        return case_of(self.problem, self.topology, self.declared, self.answer, chosen)

    def with_memory(self, share: float) -> Search:
        """Return the search again, with `share` of the memory that this one planned for."""
        capacity = self.answer.capacity_bytes * share
        rooms = tuple(room for room in ROOMS if room <= self.answer.room)
        answer = self.problem.solve(self.topology, self.declared, capacity, rooms)
        found = dataclasses.replace(self, answer=answer)
        return _through_stages(found) or found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Leave Python's garbage collector off, if it is on.

    A search makes some million records that live to its end: looking through them again and again for what
    could go takes a sixth of its time and finds nothing.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_no_collection()
def best_of(problem: Problem, topology: Topology, declared: Declared) -> tuple[Record, Search]:
    """Return the fastest plan on `topology` that fits its memory and keeps what is declared.

    Raises UserError, saying by how much and what would help, if nothing fits.
    """
    try:
        return _best_of(problem, topology, declared)
    finally:
        problem.forget()


def _best_of(problem: Problem, topology: Topology, declared: Declared) -> tuple[Record, Search]:
    answer = problem.solve(topology, declared, rooms=ROOMS)
    found = Search(problem=problem, topology=topology, declared=declared, answer=answer)
    other = _as_written(found)
    best = answer.found.best
    if other is not None:
        found, rolled, best = other, best, other.answer.found.best
        assert best is not None
        found = _with_nearly(found)
        return _noted(_told(found.plan(best), found), rolled, best), found
    staged = _through_stages(found)
    if staged is not None:
        found, best = staged, staged.answer.found.best
    if best is None:
        raise UserError(nothing_fits(problem, topology, declared, answer))
    found = _with_nearly(found)
    return _told(found.plan(best), found), found


def _with_nearly(search: Search) -> Search:
    """Return the search with the faster plan that may fit, if there is one."""
    answer = search.problem.nearly(search.topology, search.declared, search.answer)
    return (
        search
        if answer is None
        else dataclasses.replace(search, nearly=dataclasses.replace(search, answer=answer))
    )


def settled(notes: Sequence[str]) -> tuple[str, ...]:
    """Return `notes` without those on what only a compiler can say, once it has."""
    return tuple(note for note in notes if note != _TIGHT and not note.endswith(_TRIED_FIRST))


def _told(record: Record, search: Search) -> Record:
    """Return the plan with a note on the faster one that may fit."""
    nearly = None if search.nearly is None else search.nearly.answer.found.best
    if nearly is None or record.estimate is None:
        return record
    priced = nearly.candidate
    layout = layout_in_words(priced.mesh, priced.remat, priced.microbatches, dict(priced.saved))
    took, share = nearly.estimate.step_seconds, nearly.estimate.step_seconds / record.estimate.step_seconds
    note = (
        f"{layout} is estimated at {seconds(took)}, {1 - share:.0%} less, and fits only if the compiler "
        f"leaves less memory free between arrays than it usually does ({gib(nearly.estimate.peak_bytes)} of "
        f"{gib(search.answer.capacity_bytes)} without): {_TRIED_FIRST}"
    )
    return dataclasses.replace(record, notes=(*record.notes, note))


def _through_stages(search: Search) -> Search | None:
    """Return the search over stages where a pipeline is worth taking and its loss goes through them."""
    problem = search.problem
    answer = with_stages(problem, search.topology, search.declared, search.answer)
    best = answer.found.best
    if answer is search.answer or best is None:
        return None
    found = dataclasses.replace(search, answer=answer)
    return found if why_not_run(problem, found.plan(best)) is None else None


def _as_written(search: Search) -> Search | None:
    """Return the search with layers as they are written, where these take less time or fit at last.

    It is made where the stacks of a scan over them take so much that this may be.
    """
    problem, topology, best = search.problem, search.topology, search.answer.found.best
    stacks = problem.program.stacks
    if search.declared.mesh.get("stage", 1) != 1:
        return None
    if not stacks or topology.chip.nominal or sum(len(one.arguments) for one in stacks) > _MOST_STACKED:
        return None
    if best is not None and best.estimate.time.get("stacks", 0.0) < _STACKS * best.estimate.step_seconds:
        return None
    forms = tuple(form for form in problem.recognise if form != "layers")
    written = dataclasses.replace(problem, recognise=forms)
    try:
        answer = written.solve(topology, search.declared, rooms=ROOMS)
    except UserError:
        # What is declared is said of layers.
        return None
    found = answer.found.best
    if found is None or (best is not None and found.estimate.step_seconds >= best.estimate.step_seconds):
        return None
    return dataclasses.replace(search, problem=written, answer=answer)


def _noted(record: Record, rolled: Priced | None, written: Priced) -> Record:
    """Return the plan with a note on why layers are not run as a scan."""
    took = seconds(written.estimate.step_seconds)
    instead = "what does not fit" if rolled is None else seconds(rolled.estimate.step_seconds)
    note = (
        f"layers stay as they are written: a step is estimated to take {took} instead of {instead} with "
        "their parameters stacked for a scan"
    )
    return dataclasses.replace(record, notes=(*record.notes, note))


def declared_plan(problem: Problem, topology: Topology, declared: Declared) -> Record:
    """Return the plan of a layout that is wholly declared, estimated as one that was searched for is.

    Raises UserError if a rule cannot hold, never for what is estimated: a note says what will not fit.
    """
    laid = ruled(
        problem.program,
        topology,
        declared,
        params=problem.params,
        names=problem.names,
    )
    proof = problem.accumulation(declared)
    proof.check(laid.candidate.microbatches)
    laid = with_unnamed(problem.program, topology, declared, laid)
    candidate = laid.candidate
    if problem.state is not None:
        candidate = _with_state(problem, topology, candidate)
    kernel = problem.kernel(topology, declared)
    if declared.remat is not None:
        check_names(checked_remat(problem.program, declared.remat), problem.table(kernel.calls))
    pricer = problem.pricer(topology, declared)
    capacity = capacity_of(topology, pricer)
    words = context.words(problem.attention, candidate, declared.context, kernel)
    candidate, estimate = _over_context(words, candidate, pricer, capacity)
    kernels, of_experts = _kernels(problem, topology, declared, kernel, candidate)
    notes = (
        *laid.notes,
        *build.notes_of_turns(problem.program, candidate),
        *build.notes_on_sharing(candidate),
        *_notes_on(problem, kernel, candidate),
        *of_experts,
    )
    notes += sequences.notes_on(problem.program, candidate)
    notes += context.notes_on(problem.attention, candidate, kernel)
    notes += _notes_on_experts(problem.program, candidate)
    # Rules say of theirs where they yield.
    said = " ".join(notes).replace(",", " ").replace(":", " ").split()
    notes += tuple(
        note
        for note in build.notes_of(problem.program, topology, candidate)
        if note.partition(" ")[0] not in said
    )
    if estimate.needed_bytes > capacity and not topology.chip.nominal:
        notes += (
            f"it is estimated to need {gib(estimate.needed_bytes)} of a device's {gib(capacity)}: "
            "have it compiled (--verify) before it is booked",
        )
    notes += (*problem.notes(topology, candidate), *proof.notes(laid.candidate.microbatches))
    case = Case(
        problem=problem,
        topology=topology,
        declared=declared,
        candidate=candidate,
        estimate=estimate,
        capacity_bytes=capacity,
        room=1.0,
        space=only(candidate),
    )
    return build.record_of(
        problem.program,
        topology,
        candidate,
        batch=laid.batch,
        notes=(*notes, *notes_on(case)),
        estimate=estimate,
        recognise=problem.recognise,
        calibration=digest_of(problem),
        accumulation=declared.accumulation,
        compiler_options=reserve.options_of(topology, estimate),
        kernels=kernels,
        state=None if problem.state is None else build.state_of(problem.program, candidate),
    )


def _kernels(
    problem: Problem, topology: Topology, declared: Declared, attention: Chosen, candidate: Candidate
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the kernels of a plan, and notes on those of experts."""
    of_experts, notes = experts.choose(problem.program, topology, declared.experts)
    fast = arithmetic.choose(problem.program, topology, declared.arithmetic, candidate.dims)
    ways = [attention.taken(site_of(one, candidate), candidate.context).by for one in problem.attention]
    of_attention = attention.kernels if any(ways) else {}
    return {**of_attention, **of_experts, **({"arithmetic": fast} if fast else {})}, notes


def _notes_on_experts(program: Program, layout: Candidate) -> tuple[str, ...]:
    """Say that gradients of experts' weights are not among those that are delayed."""
    if layout.schedule != DELAYED or layout.mesh.get("stage", 1) == 1 or not experts_dims(program):
        return ()
    return (
        f"schedule={DELAYED!r} delays no gradients of experts' weights, which come with those of inputs: "
        "stages wait for them as in 1f1b",
    )


def _notes_on(problem: Problem, kernel: Chosen, layout: Candidate) -> tuple[str, ...]:
    """Say why the chip's kernel does not carry attention out, or not all of it."""
    sites = {one.equation.index: site_of(one, layout) for one in problem.attention}
    return kernel.notes_on(sites, layout.context)


def _over_context(
    words: Sequence[str | None], candidate: Candidate, pricer: Pricer, capacity: float
) -> tuple[Candidate, Estimate]:
    """Return a declared layout with the way of attention over ``context`` that is fastest and fits."""
    ways = [dataclasses.replace(candidate, context=word) for word in words]
    priced = [(way, pricer.price(way)) for way in ways]
    return min(priced, key=lambda one: (one[1].needed_bytes > capacity, one[1].step_seconds))


def digest_of(problem: Problem) -> str | None:
    """Return the digest of the calibration that a problem is priced by, None for the shipped one."""
    return None if problem.calibration is None else problem.calibration.digest


def _with_state(problem: Problem, topology: Topology, candidate: Candidate) -> Candidate:
    """Return a declared layout, which rules give of the parameters, with the state laid out by the trace."""
    state = state_storage(
        problem.program,
        candidate.mesh,
        candidate.dims,
        candidate.stored,
        tile_rows=compiler_of(topology).tile_rows,
    )
    stored = {**candidate.stored, **state}
    return dataclasses.replace(candidate, stored=stored, optimizer=stored, gradients=stored)


def searched_instead(problem: Problem, record: Record) -> str:
    """Say what a search on the same devices would take in place of `record`, and what that would win."""
    try:
        found, search = best_of(problem, record.topology, Declared())
    except UserError as error:
        return f"plan: auto has nothing to offer: {error}"
    best, own = found.estimate, record.estimate
    assert best is not None
    assert own is not None
    layout = layout_in_words(found.mesh, found.remat, found.microbatches, found.saved)
    if search.answer.stored is not None:
        sizes = [one.memory["params"] + one.memory.get("optimizer", 0.0) for one in (best, own)]
        what = f"stores {gib(sizes[0])} of parameters and moments on a device instead of {gib(sizes[1])}"
    else:
        what = (
            f"is estimated to take {seconds(best.step_seconds)} a step instead of {seconds(own.step_seconds)}"
        )
    needs, before = gib(best.needed_bytes), gib(own.needed_bytes)
    peaks = f"needs {needs} of a device's memory" + ("" if needs == before else f" instead of {before}")
    return f"plan: auto would take {layout}, which {what} and {peaks}"
