"""Have the compiler judge plans: compile the best, fall through to what fits, keep what is really faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..hardware.topology import Topology
from ..words import gib, layout_in_words, seconds

if TYPE_CHECKING:
    from ..plans.origin import Alternative
    from ..plans.record import Plan
    from ..verify.process import Limits
    from ..verify.verify import Verdict

# Outcomes that another plan may not share.
_OF_THE_PLAN = ("out_of_memory", "vmem_overflow", "failed")
# Searches again with less memory, each after a plan that was too large.
_ROUNDS = 3
# What is left free where memory was underestimated, so that the next plan does not miss by a hair.
_MARGIN = 0.98


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A plan that was compiled, and what became of it."""

    plan: Plan
    verdict: Verdict

    def sentence(self, chosen: Attempt) -> str:
        """Return why this attempt is not the `chosen` one."""
        if not self.verdict.fits:
            return self.verdict.message
        mine, best = _seconds(self), _seconds(chosen)
        longer = f"{mine / best - 1:.1%} longer, in {gib(self.verdict.peak_bytes)}"
        return f"compiled, it takes {seconds(mine)}, {longer}"


def prove(
    plan: Plan,
    given: tuple[Any, Any, Any, Any] = (None, None, None, None),
    *,
    top: int = 1,
    limits: Limits | None = None,
    use_cache: bool = True,
) -> Plan:
    """Return `plan`, or what the compiler shows to be better, with its proof; see `Plan.verify`."""
    from ..verify.verify import verify

    if top < 1:
        raise UserError(f"top={top} plans cannot be compiled; nearest: 1")
    program = _program(plan, given)

    def judge(made: Plan) -> Verdict:
        return verify(made, *program, limits=limits, use_cache=use_cache)

    attempts: list[Attempt] = []
    for candidate in _candidates(plan, attempts):
        verdict = judge(candidate)
        attempts.append(Attempt(plan=candidate, verdict=verdict))
        if not verdict.fits and verdict.outcome not in _OF_THE_PLAN:
            raise UserError(f"{_name(candidate)} could not be verified: {verdict.message}")
        enough = any(attempt.verdict.fits for attempt in attempts) and len(attempts) >= top
        if enough or len(attempts) >= top + _ROUNDS:
            break
    fitting = [attempt for attempt in attempts if attempt.verdict.fits]
    if fitting:
        chosen = _chosen(min(fitting, key=_seconds), attempts)
        return chosen if top == 1 or plan.compiler_options else _with_options(chosen, judge)
    told = "; ".join(f"{_name(attempt.plan)}: {attempt.verdict.message}" for attempt in attempts)
    raise UserError(f"nothing that was compiled for {plan.topology} fits: {told}")


def _candidates(plan: Plan, attempts: Sequence[Attempt]) -> Iterator[Plan]:
    """Yield `plan`, then the next best; after one that was too large, the best of what needs less memory."""
    yield plan
    if plan.search is None:
        return
    search, seen, rounds = plan.search, {_identity(plan)}, 0
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
        following = next(
            (one for one in map(search.plan, ranked) if _identity(one) not in seen),
            None,
        )
        if following is None:
            return
        seen.add(_identity(following))
        yield dataclasses.replace(following, compiler_options=plan.compiler_options)


def _chosen(chosen: Attempt, attempts: Sequence[Attempt]) -> Plan:
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


def _with_options(chosen: Plan, judge: Callable[[Plan], Verdict]) -> Plan:
    """Return `chosen`, or it with those of its chip's options that the compiler shows to make it faster.

    Set by set, each with those that helped before it, so that not every combination is compiled.
    """
    from ..xla.options import trials_for

    best, names, notes = chosen, [], []
    for trial in trials_for(Topology.parse(chosen.topology)):
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


def _program(plan: Plan, given: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Return loss, params, batch and optimizer: those given, or those that the plan was searched for."""
    problem = None if plan.search is None else plan.search.problem
    known = (
        (None,) * 4 if problem is None else (problem.loss, problem.params, problem.batch, problem.optimizer)
    )
    found = [known[n] if one is None else one for n, one in enumerate(given)]
    for name, one in zip(("loss", "params", "batch", "optimizer"), found, strict=True):
        if one is None:
            raise UserError(f"this plan knows no {name}; write plan.verify(loss, params, batch, optimizer)")
    return found[0], found[1], found[2], found[3]


def _identity(plan: Plan | Alternative) -> tuple[Any, ...]:
    """Return what tells layouts apart that a search found; an Alternative's is that of its plan."""
    estimate = plan.estimate
    priced = () if estimate is None else (estimate.step_seconds, estimate.peak_bytes)
    return (tuple(plan.mesh.items()), plan.remat, tuple(plan.saved.items()), plan.microbatches, priced)


def _seconds(attempt: Attempt) -> float:
    proof = attempt.verdict.proof
    return float("inf") if proof is None else proof.step_seconds


def _name(plan: Plan) -> str:
    return layout_in_words(plan.mesh, plan.remat, plan.microbatches, plan.saved)
