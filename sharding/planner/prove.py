"""Have the compiler judge plans: compile the best, fall through to what fits, keep what is really faster.

Of several plans for a compiler that shows its schedule before it makes machine code, each is scheduled, and
compiled whole are only those that may be the fastest: the fastest as scheduled, and the next one where the
error of such a reading leaves it open which of the two is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..plans.origin import Alternative
from ..plans.proof import Proof
from ..plans.record import Record
from ..verify import verify
from ..verify.process import Limits
from ..verify.scheduled import shows_schedule
from ..verify.verify import Verdict
from ..words import gib, layout_in_words, seconds
from .options import Judge, with_options
from .outcome import Search, settled
from .reserve import MEMORY_OPTION, declared_options

# Outcomes that another plan may not share.
_OF_THE_PLAN = ("out_of_memory", "vmem_overflow", "failed")
# Searches again with less memory, each after a plan that was too large.
_ROUNDS = 3
# What is left free where memory was underestimated, so that the next plan does not miss by a hair.
_MARGIN = 0.98
# Times its seconds as compiled that a step has as scheduled, at most (`benchmarks/quick.py`: 0.94 to 1.084).
_OVERSTATED = 1.09
# Plans that are compiled whole of those that are scheduled.
_COMPILED = 2
_WHOLE = "the step is compiled whole: only compilers for TPUs show what they scheduled before machine code"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A plan that was compiled, the search that it came out of, and what became of it.

    `scheduled` is what the schedule said, of a plan that is compiled whole after that.
    """

    plan: Record
    search: Search | None
    verdict: Verdict
    scheduled: Proof | None = None

    @property
    def seconds(self) -> float:
        """Of a step, by the compiler's last word; infinite where it made none."""
        proof = self.verdict.proof
        return float("inf") if proof is None else proof.step_seconds

    @property
    def made(self) -> str:
        """How far the compiler went: ``scheduled`` or ``compiled``."""
        return "compiled" if self.verdict.proof is None else self.verdict.proof.made

    def sentence(self, chosen: Attempt) -> str:
        """Return why this attempt is not the `chosen` one."""
        if not self.verdict.fits:
            return self.verdict.message
        mine, made, than, beside = self.seconds, self.made, "", chosen.seconds
        if made != chosen.made:  # seconds as scheduled are compared with such seconds where they are known
            best = chosen.scheduled or chosen.verdict.proof
            assert best is not None
            made = "scheduled only" if made == "scheduled" else made
            than, beside = f" than this one as {best.made}", best.step_seconds
        share = mine / beside - 1
        longer = f"{share:.1%} longer{than}" if share >= 5e-4 else f"as long{than.replace('than', 'as')}"
        return f"{made}, it takes {seconds(mine)}, {longer}, in {gib(self.verdict.peak_bytes)}"


def prove(
    plan: Record,
    search: Search | None,
    program: Mapping[str, Any],
    *,
    fingerprint: str | None = None,
    top: int = 1,
    limits: Limits | None = None,
    use_cache: bool = True,
    quick: bool = False,
) -> tuple[Record, Search | None]:
    """Return `plan`, or what the compiler shows to be better, with its proof, and the search it came out of.

    Args:
        plan: compiled first.
        search: what it came out of; without one nothing else is tried.
        program: its ``loss``, ``params``, ``batch``, ``optimizer`` and ``state``.
        fingerprint: of the traced loss, where it is known.
        top: layouts to compile, of which the fastest is taken.
        limits: time and memory of each compile.
        use_cache: whether an answer from before will do.
        quick: whether what the compiler has scheduled will do, before it makes machine code of it.

    Raises:
        UserError: nothing compiled fits, or there is no compiler for the topology.
    """
    if top < 1:
        raise UserError(f"top={top} plans cannot be compiled; nearest: 1")

    shown = shows_schedule(plan.topology)
    first = quick or (top > 1 and shown)

    def judge(plan: Record, *, quick: bool) -> Verdict:
        return verify.verify(
            plan,
            **program,
            fingerprint=fingerprint,
            limits=limits,
            use_cache=use_cache,
            quick=quick,
            # Of several all are compared as scheduled, whichever happen to be known as compiled.
            scheduled=quick and shown and top > 1,
        )

    attempts = _attempts(plan, search, judge, top=top, quick=first)
    if first and not quick:
        attempts = _compiled(attempts, judge)
    fitting = [attempt for attempt in attempts if attempt.verdict.fits]
    if not fitting:
        told = "; ".join(f"{_name(attempt.plan)}: {attempt.verdict.message}" for attempt in attempts)
        raise UserError(f"nothing that was compiled for {plan.topology} fits: {told}")
    whole = [attempt for attempt in fitting if attempt.made == "compiled"]
    best = min(fitting if quick else whole, key=lambda attempt: attempt.seconds)
    if quick and not shown:
        best = _with_note(best, _WHOLE)
    chosen = _chosen(best, attempts)
    declared = declared_options(plan.topology, plan.estimate, plan.compiler_options)
    # What tells the compiler of its memory is no choice among ways to compile.
    if top > 1 and not declared.keys() - {MEMORY_OPTION}:
        chosen = with_options(chosen, best.scheduled, judge, quick=quick)
    return chosen, best.search


def _attempts(plan: Record, search: Search | None, judge: Judge, *, top: int, quick: bool) -> list[Attempt]:
    """Return the first `top` plans as the compiler judges them, and more until one fits.

    Raises:
        UserError: a verdict that another plan would share.
    """
    attempts: list[Attempt] = []
    for candidate, found_by in _candidates(plan, search, attempts):
        verdict = judge(candidate, quick=quick)
        attempts.append(Attempt(plan=candidate, search=found_by, verdict=verdict))
        _refuse_shared(attempts[-1])
        enough = any(attempt.verdict.fits for attempt in attempts) and len(attempts) >= top
        if enough or len(attempts) >= top + _ROUNDS:
            break
    return attempts


def _refuse_shared(attempt: Attempt) -> None:
    """Raise UserError for a verdict that another plan would share."""
    verdict = attempt.verdict
    if not verdict.fits and verdict.outcome not in _OF_THE_PLAN:
        raise UserError(f"{_name(attempt.plan)} could not be verified: {verdict.message}")


def _compiled(attempts: Sequence[Attempt], judge: Judge) -> list[Attempt]:
    """Return `attempts` with those compiled whole that may be the fastest, until one at least fits."""
    found, least = list(attempts), float("inf")
    fitting = [number for number, attempt in enumerate(attempts) if attempt.verdict.fits]
    for tried, number in enumerate(sorted(fitting, key=lambda number: attempts[number].seconds)):
        attempt = attempts[number]
        if least < float("inf") and (tried >= _COMPILED or attempt.seconds > _OVERSTATED * least):
            break
        if attempt.made == "scheduled":
            scheduled, verdict = attempt.verdict.proof, judge(attempt.plan, quick=False)
            found[number] = attempt = dataclasses.replace(attempt, verdict=verdict, scheduled=scheduled)
            _refuse_shared(attempt)
        if attempt.verdict.fits:
            least = min(least, attempt.seconds)
    return found


def _with_note(attempt: Attempt, note: str) -> Attempt:
    return dataclasses.replace(
        attempt, plan=dataclasses.replace(attempt.plan, notes=(*attempt.plan.notes, note))
    )


def _candidates(
    plan: Record, search: Search | None, attempts: Sequence[Attempt]
) -> Iterator[tuple[Record, Search | None]]:
    """Yield `plan`, then the next best; after one that was too large, the best of what needs less memory.

    Before it comes the faster one that the compiler alone can say of whether it fits.
    """
    tried, rounds = [plan.decision()], 0
    if search is not None and search.nearly is not None and search.nearly.answer.found.best is not None:
        faster = _with_declared(search.nearly.plan(search.nearly.answer.found.best), plan)
        tried.append(faster.decision())
        yield faster, search.nearly
    yield plan, search
    if search is None:
        return
    while True:
        last = attempts[-1].verdict
        estimate = attempts[-1].plan.estimate
        too_large = last.outcome == "out_of_memory" and last.peak_bytes > 0
        if too_large and estimate is not None and rounds < _ROUNDS:
            rounds += 1
            underestimated = last.peak_bytes / estimate.needed_bytes
            offered = last.capacity_bytes / search.answer.capacity_bytes
            search = search.with_memory(min(_MARGIN, _MARGIN * offered / underestimated))
        found = search.answer.found
        ranked = [
            one for one in (found.best, *found.others) if one is not None and one.fits and not one.bound
        ]
        offered_plans = (_with_declared(search.plan(one), plan) for one in ranked)
        following = next((one for one in offered_plans if one.decision() not in tried), None)
        if following is None:
            return
        tried.append(following.decision())
        yield following, search


def _with_declared(found: Record, plan: Record) -> Record:
    """Return `found` with the options that are declared of `plan`."""
    declared = declared_options(plan.topology, plan.estimate, plan.compiler_options)
    return dataclasses.replace(found, compiler_options={**found.compiler_options, **declared})


def _chosen(chosen: Attempt, attempts: Sequence[Attempt]) -> Record:
    """Return the plan of `chosen` with its proof, and what the compiler said of the others."""
    told = {
        _identity(attempt.plan): attempt.sentence(chosen) for attempt in attempts if attempt is not chosen
    }
    rows = [
        dataclasses.replace(row, lost=told.pop(_identity(row))) if _identity(row) in told else row
        for row in chosen.plan.alternatives
    ]
    notes = tuple(
        f"{attempt.made} and not taken: {_name(attempt.plan)}: {told[_identity(attempt.plan)]}"
        for attempt in attempts
        if _identity(attempt.plan) in told
    )
    return dataclasses.replace(
        chosen.plan,
        proof=chosen.verdict.proof,
        alternatives=tuple(rows),
        notes=(*settled(chosen.plan.notes), *notes),
    )


def _identity(plan: Record | Alternative) -> tuple[Any, ...]:
    """Return what an Alternative and the plan of the same layout have in common."""
    estimate = plan.estimate
    priced = () if estimate is None else (estimate.step_seconds, estimate.peak_bytes)
    return (tuple(plan.mesh.items()), plan.remat, tuple(plan.saved.items()), plan.microbatches, priced)


def _name(plan: Record) -> str:
    return layout_in_words(plan.mesh, plan.remat, plan.microbatches, plan.saved)
