"""The steps of a run, one after the other: nothing here waits for a device only to know a number."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ...sharding.errors import UserError, one_line
from ...sharding.transform.metrics import named
from ...sharding.transform.step import has_stopped, of_loss
from ..checkpoint import Checkpoints
from ..config import Config
from ..data import Prefetch
from ..faults import StepWatchdog, StopSignal
from ..profiling import ProfileWindow
from .job import Job
from .metrics import NOT_KEPT, Collector, NotFinite
from .rounds import RoundsWatch


@dataclasses.dataclass(kw_only=True)
class TrainingLoop:
    """What the steps of a run need.

    `update(state, batch)` is the compiled step; `traced` the same as it runs while a profile is captured,
    where that is another executable. `say` prints a line, in one process; `rounds` watches, in every one.
    """

    config: Config
    job: Job
    update: Callable[[Any, Any], tuple[Any, Any]]
    checkpoints: Checkpoints
    collector: Collector
    window: ProfileWindow
    stop: StopSignal
    watchdog: StepWatchdog
    say: Callable[[str], object]
    traced: Callable[[Any, Any], tuple[Any, Any]] | None = None
    rounds: RoundsWatch | None = None
    _held_out: list[Any] = dataclasses.field(default_factory=list)
    _state: Any = None

    def run(self, state: Any, start: int) -> tuple[Any, int]:
        """Train from `start` steps done to the last, or until asked to stop; return state and steps done.

        The state is saved when it is due, and in the end, whichever way that comes.
        """
        try:
            return self._run(state, start)
        except NotFinite as error:
            if error.step is not None:
                self._say_where(error.step)
            raise

    def _run(self, state: Any, start: int) -> tuple[Any, int]:
        steps = self.config.train.steps
        step = start
        self._state = state
        sharding = self.job.step.batch["tokens"]
        with self.job.data.iterate(start, sharding, stop_step=steps) as batches:
            for step in range(start + 1, steps + 1):
                self.watchdog.beat(step)
                state = self._step(state, step, batches)
                if step == start + 1:
                    # While the devices are busy with the first step.
                    self.checkpoints.prepare(self.job.step.abstract_state)
                self.checkpoints.check()
                stopping = self.stop.at(step)
                if stopping or step == steps or self._due(step, self.config.checkpoint.every):
                    self._save(state, step)
                if stopping:
                    break
        return state, step

    def _step(self, state: Any, step: int, batches: Prefetch[Any]) -> Any:
        if self.window.opens_at(step):
            self._before_window(state, step)
        self.collector.wait_for_slot(step)

        def quiet() -> contextlib.AbstractContextManager[object]:
            return self._quiet(batches, state)

        self.window.on_step_start(step, quiet)
        asked_at = time.perf_counter()
        with self.window.data_wait():
            batch = next(batches)
        # A GPU loads an executable when it first runs it, which is none of the window's steps.
        nears = self.window.active or self.window.opens_at(step + 1)
        update = (self.traced or self.update) if nears else self.update
        state, metrics = update(state, batch)
        self._state = state
        done_at = self.window.on_step_end(step, metrics, quiet)
        train = self.config.train
        evaluate = train.evaluate_every and (self._due(step, train.evaluate_every) or step == train.steps)
        # To come: the first evaluation is compiled, which is none of the step's time.
        evaluation = concurrent.futures.Future() if evaluate else None
        self.collector.submit(
            step,
            metrics,
            asked_at=asked_at,
            done_at=done_at,
            data_wait_seconds=batches.wait_seconds,
            evaluation=evaluation,
        )
        if evaluation is not None:
            try:
                evaluation.set_result(self._evaluate(state))
            except BaseException as error:
                evaluation.set_exception(error)
                raise
        return state

    def _say_where(self, step: int) -> None:
        """Say where a value of a step was first not finite; the state still has its parameters."""
        job, state = self.job, self._state
        self.say("looking for where that began, in a program of its own that is compiled for it")
        try:
            with self.watchdog.paused():
                found = job.plan.first_not_finite(
                    job.loss, state["params"], self._batch_of(step), *of_loss(state), mesh=job.mesh
                )
        except (UserError, jax.errors.JaxRuntimeError) as error:
            self.say(f"it was not found: {one_line(error)}")
            return
        self.say(f"step {step}: {found}")

    def _count_rounds(self, state: Any, step: int) -> None:
        """Say how many rounds the exchanges of a step's batch take, once all have drained the same steps."""
        try:
            with self.watchdog.paused():
                found = self.job.plan.count_rounds(
                    self.job.loss, state["params"], self._batch_of(step), *of_loss(state), mesh=self.job.mesh
                )
        except (UserError, jax.errors.JaxRuntimeError) as error:
            self.say(f"rounds were not counted: {one_line(error)}")
            return
        several = sum(count for rounds, count in found.items() if rounds > 1)
        self.say(
            f"counted on the batch of step {step}: {several} of {sum(found.values())} exchanges take more "
            f"than one round, {max(found, default=1)} at most"
        )

    def _batch_of(self, step: int) -> Any:
        sharding = self.job.step.batch["tokens"]
        with self.job.data.iterate(step - 1, sharding, stop_step=step) as batches:
            return next(batches)

    def _before_window(self, state: Any, step: int) -> None:
        """Save what was trained so far: a profiler may take the process with it."""
        if step > 1:
            self._save(state, step - 1)
            with self.watchdog.paused():
                self.checkpoints.wait()

    @contextlib.contextmanager
    def _quiet(self, batches: Prefetch[Any], state: Any) -> Iterator[None]:
        """Have nothing run on the devices within the block: no step, no reading of metrics, no transfer."""
        self.collector.drain(held=1)
        with self.watchdog.paused(), batches.held() as ready:
            self.checkpoints.wait()
            jax.block_until_ready((state, ready))
            yield

    def _evaluate(self, state: Any) -> list[tuple[Any, Any]]:
        """Return (mean loss, weight) of each held-out batch, still on the devices."""
        if not self._held_out:
            assert self.job.held_out is not None
            sharding = self.job.step.batch["tokens"]
            count = self.config.train.evaluate_batches
            with self.job.held_out.iterate(0, sharding, stop_step=count) as batches:
                self._held_out = list(batches)
        step = self.job.step
        results = [step.evaluate(state["params"], batch, *of_loss(state)) for batch in self._held_out]
        return [(mean, named(aux, ()).get("weight", 1.0)) for mean, aux in results]

    def _save(self, state: Any, step: int) -> None:
        """Save the state once every step so far is known to have been finite."""
        self.collector.drain()
        if self.job.step.guarded and has_stopped(state):
            raise NotFinite(f"a loss or gradient up to step {step} was not finite; {NOT_KEPT}")
        if self.rounds is not None and self.rounds.said:
            self._count_rounds(state, step)
            self.rounds = None
        last = self.collector.last
        metrics = {key: last[key] for key in ("loss", "eval_loss") if key in last}
        with self.watchdog.paused():
            self.checkpoints.save(step, state, metadata=self._metadata(step), metrics=metrics)

    def _metadata(self, step: int) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "mesh": dict(self.job.plan.mesh),
            "topology": str(self.job.plan.topology),
            "data": {"step": step, "seed": self.config.seed, "fingerprint": self.job.data.fingerprint},
            "versions": {
                name: importlib.metadata.version(name) for name in ("meshwright", "jax", "orbax-checkpoint")
            },
        }

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0
