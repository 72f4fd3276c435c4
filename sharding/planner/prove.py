"""Have the compiler judge plans: compile the best, fall through to what fits, keep what is really faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..plans.origin import Alternative
from ..plans.record import Record
from ..verify import verify
from ..verify.process import Limits
from ..verify.scheduled import shows_schedule
from ..verify.verify import Verdict
from ..words import gib, layout_in_words, seconds
from ..xla import options
from .outcome import Search
from .reserve import MEMORY_OPTION, declared_options

# Outcomes that another plan may not share.
_OF_THE_PLAN = ("out_of_memory", "vmem_overflow", "failed")
# Searches again with less memory, each after a plan that was too large.
_ROUNDS = 3
# What is left free where memory was underestimated, so that the next plan does not miss by a hair.
_MARGIN = 0.98
_WHOLE = "the step is compiled whole: only compilers for TPUs show what they scheduled before machine code"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A plan that was compiled, the search that it came out of, and what became of it."""

    plan: Record
    search: Search | None
    verdict: Verdict

    def sentence(self, chosen: Attempt) -> str:
        """Return why this attempt is not the `chosen` one."""
        if not self.verdict.fits:
            return self.verdict.message
        mine, best = _seconds(self), _seconds(chosen)
        share = mine / best - 1
        longer = f"{share:.1%} longer" if share >= 5e-4 else "as long"
        return f"compiled, it takes {seconds(mine)}, {longer}, in {gib(self.verdict.peak_bytes)}"


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

    def judge(made: Record) -> Verdict:
        return verify.verify(
            made, **program, fingerprint=fingerprint, limits=limits, use_cache=use_cache, quick=quick
        )

    attempts: list[Attempt] = []
    for candidate, found_by in _candidates(plan, search, attempts):
        verdict = judge(candidate)
        attempts.append(Attempt(plan=candidate, search=found_by, verdict=verdict))
        if not verdict.fits and verdict.outcome not in _OF_THE_PLAN:
            raise UserError(f"{_name(candidate)} could not be verified: {verdict.message}")
        enough = any(attempt.verdict.fits for attempt in attempts) and len(attempts) >= top
        if enough or len(attempts) >= top + _ROUNDS:
            break
    fitting = [attempt for attempt in attempts if attempt.verdict.fits]
    if fitting and quick and not shows_schedule(plan.topology):
        fitting = [_with_note(attempt, _WHOLE) for attempt in fitting]
    if fitting:
        best = min(fitting, key=_seconds)
        chosen = _chosen(best, attempts)
        declared = declared_options(plan.topology, plan.estimate, plan.compiler_options)
        # What tells the compiler of its memory is no choice among ways to compile.
        if top > 1 and not declared.keys() - {MEMORY_OPTION}:
            chosen = _with_options(chosen, judge)
        return chosen, best.search
    told = "; ".join(f"{_name(attempt.plan)}: {attempt.verdict.message}" for attempt in attempts)
    raise UserError(f"nothing that was compiled for {plan.topology} fits: {told}")


def _with_note(attempt: Attempt, note: str) -> Attempt:
    return dataclasses.replace(
        attempt, plan=dataclasses.replace(attempt.plan, notes=(*attempt.plan.notes, note))
    )


def _candidates(
    plan: Record, search: Search | None, attempts: Sequence[Attempt]
) -> Iterator[tuple[Record, Search | None]]:
    """Yield `plan`, then the next best; after one that was too large, the best of what needs less memory."""
    yield plan, search
    if search is None:
        return
    tried, rounds = [plan.decision()], 0
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
        f"compiled and not taken: {_name(attempt.plan)}: {told[_identity(attempt.plan)]}"
        for attempt in attempts
        if _identity(attempt.plan) in told
    )
    return dataclasses.replace(
        chosen.plan,
        proof=chosen.verdict.proof,
        alternatives=tuple(rows),
        notes=(*chosen.plan.notes, *notes),
    )


def _with_options(chosen: Record, judge: Callable[[Record], Verdict]) -> Record:
    """Return `chosen`, or it with those of its chip's options that the compiler shows to make it faster.

    Set by set, each with those that helped before it, so that not every combination is compiled.
    """
    best, names, notes = chosen, [], []
    for trial in options.trials_for(chosen.topology):
        tried = dataclasses.replace(best, compiler_options={**best.compiler_options, **trial.options})
        verdict = judge(tried)
        if not verdict.fits or verdict.proof is None:
            notes.append(f"compiler options {trial.name}: {verdict.message}")
            continue
        assert best.proof is not None
        took, without = verdict.proof.step_seconds, best.proof.step_seconds
        what = " beside ".join((trial.name, *names))
        doubt = "" if trial.ran else "; no device has run them yet"
        notes.append(f"compiler options {what}: {seconds(took)} compiled, {seconds(without)} without{doubt}")
        if took < without:
            best = dataclasses.replace(tried, proof=verdict.proof)
            names.append(trial.name)
    return dataclasses.replace(best, notes=(*best.notes, *notes))


def _identity(plan: Record | Alternative) -> tuple[Any, ...]:
    """Return what an Alternative and the plan of the same layout have in common."""
    estimate = plan.estimate
    priced = () if estimate is None else (estimate.step_seconds, estimate.peak_bytes)
    return (tuple(plan.mesh.items()), plan.remat, tuple(plan.saved.items()), plan.microbatches, priced)


def _seconds(attempt: Attempt) -> float:
    proof = attempt.verdict.proof
    return float("inf") if proof is None else proof.step_seconds


def _name(plan: Record) -> str:
    return layout_in_words(plan.mesh, plan.remat, plan.microbatches, plan.saved)
