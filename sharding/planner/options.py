"""Options of the compiler that a plan takes where the compiler shows them to make its step faster."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from ..plans.proof import Proof
from ..plans.record import Record
from ..verify.verify import Verdict
from ..words import seconds
from ..xla import options
from ..xla.options import Trial


class Judge(Protocol):
    """What has the compiler judge a plan, of which `quick` asks for the schedule alone."""

    def __call__(self, plan: Record, *, quick: bool) -> Verdict: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tried:
    """A plan with the options that helped so far, its proof, their sets' names, and what is said of all."""

    plan: Record
    proof: Proof
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def after(self, trial: Trial, judge: Judge, *, quick: bool) -> _Tried:
        """Return this after `trial`, with its options where they make the step faster."""
        plan = dataclasses.replace(
            self.plan, compiler_options={**self.plan.compiler_options, **trial.options}
        )
        verdict = judge(plan, quick=quick)
        if not verdict.fits or verdict.proof is None:
            return self._saying(f"compiler options {trial.name}: {verdict.message}")
        said = self._saying(_sentence(trial, self.names, verdict.proof, self.proof))
        if verdict.proof.step_seconds >= self.proof.step_seconds:
            return said
        return dataclasses.replace(said, plan=plan, proof=verdict.proof, names=(*self.names, trial.name))

    def _saying(self, note: str) -> _Tried:
        return dataclasses.replace(self, notes=(*self.notes, note))


def with_options(chosen: Record, scheduled: Proof | None, judge: Judge, *, quick: bool) -> Record:
    """Return `chosen`, or it with those of its chip's options that the compiler shows to make it faster.

    Set by set, each with those that helped before it, so that not every combination is compiled. Where the
    plan was scheduled before it was compiled, sets whose effect a schedule shows are scheduled first, and
    those of them that help are compiled whole once, together.

    Args:
      chosen: with its proof.
      scheduled: what its schedule said before it was compiled, if that is known.
      judge: has the compiler judge a plan.
      quick: whether schedules decide alone.
    """
    assert chosen.proof is not None
    trials = options.trials_for(chosen.topology)
    shown = [] if scheduled is None else [trial for trial in trials if trial.scheduled]
    found = _Tried(plan=chosen, proof=chosen.proof)
    if scheduled is not None and shown:
        found = _scheduled(found, scheduled, shown, judge)
    for trial in trials:
        if trial not in shown:
            found = found.after(trial, judge, quick=quick)
    return dataclasses.replace(found.plan, proof=found.proof, notes=(*chosen.notes, *found.notes))


def _scheduled(whole: _Tried, scheduled: Proof, trials: list[Trial], judge: Judge) -> _Tried:
    """Return `whole` with those of `trials` that help by the schedule, if they do as compiled together."""
    found = _Tried(plan=whole.plan, proof=scheduled)
    for trial in trials:
        found = found.after(trial, judge, quick=True)
    notes = (*whole.notes, *found.notes)
    if not found.names:
        return dataclasses.replace(whole, notes=notes)
    helping = [one for one in trials if one.name in found.names]
    together = Trial(
        name=" beside ".join(reversed(found.names)),
        options={name: value for one in helping for name, value in one.options.items()},
        ran=all(one.ran for one in helping),
    )
    return dataclasses.replace(whole, notes=notes).after(together, judge, quick=False)


def _sentence(trial: Trial, names: tuple[str, ...], proof: Proof, without: Proof) -> str:
    what = " beside ".join((trial.name, *names))
    took, before = seconds(proof.step_seconds), seconds(without.step_seconds)
    doubt = "" if trial.ran else "; no device has run them yet"
    return f"compiler options {what}: {took} {proof.made}, {before} without{doubt}"
