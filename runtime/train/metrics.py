"""What happened in each step: collected without holding the loop, written to every sink in order."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import json
import math
import pathlib
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ...sharding.errors import UserError
from ...sharding.files import write_whole
from ...sharding.transform.metrics import LOGGED
from ..errors import RunError

# Steps that may be under way on the devices before the loop waits: enough to hide its own work, and few
# enough that a stop or an error is seen soon.
IN_FLIGHT = 2

# What a record says beside a step's metrics.
_OWN = ("step", "step_seconds", "tokens_per_second", "data_wait_seconds", "eval_loss")

NOT_KEPT = (
    "nothing of that step is kept, and every checkpoint is of before; a lower optimizer.learning_rate, more "
    "optimizer.warmup_steps or a smaller optimizer.clip_norm may help, in a folder of its own (run=FOLDER), "
    "and train.stop_on_nan=false trains on whatever comes"
)


class Sink(Protocol):
    """Takes the finished record of each step; `close` ends it."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one step's record: `step`, `loss` and the rest, plain numbers."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class NotFinite(RunError):
    """The loss or the gradients of `step`, where it is known, were infinite or not a number."""

    def __init__(self, words: str, step: int | None = None) -> None:
        super().__init__(words)
        self.step = step


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pending:
    step: int
    values: Mapping[str, Any]
    evaluation: concurrent.futures.Future[Sequence[tuple[Any, Any]]] | None
    asked_at: float
    done_at: float | None
    data_wait_seconds: float


class Collector:
    """Waits for the numbers of each step in a thread of its own, so that the loop need not.

    A record has `step` (steps done, from 1), `loss`, `grad_norm`, `learning_rate`, `step_seconds` (from
    when the step could start to when its result was there, data wait included), `tokens_per_second`,
    `data_wait_seconds`, the loss's own aux values by their paths (``hits/0``, ``hits/1`` of an array), and
    `eval_loss` where the step was followed by an evaluation.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        tokens_per_step: int,
        stop_on_nan: bool = True,
    ) -> None:
        self._sinks = sinks
        self._tokens = tokens_per_step
        self._stop_on_nan = stop_on_nan
        self._last_done = 0.0
        self._slots = threading.Semaphore(IN_FLIGHT)
        self._queue: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self.last: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._collect, name="metrics", daemon=True)
        self._thread.start()

    def wait_for_slot(self, step: int) -> None:
        """Return once `step` may begin, fewer than IN_FLIGHT being under way; raise what went wrong in one.

        That one was not finite is raised so many steps after it, whenever it is known: all processes look for
        where together, and have to have begun the same steps.
        """
        self._slots.acquire()
        error = self._error
        if isinstance(error, NotFinite) and error.step is not None and step < error.step + IN_FLIGHT:
            return
        if error is not None:
            raise error

    def submit(
        self,
        step: int,
        values: Mapping[str, Any],
        *,
        asked_at: float,
        data_wait_seconds: float,
        done_at: float | None = None,
        evaluation: concurrent.futures.Future[Sequence[tuple[Any, Any]]] | None = None,
    ) -> None:
        """Hand over a step's metrics as they come from the devices, unread.

        `asked_at` is the `time.perf_counter` at which the loop asked for the step's data, `done_at` that at
        which its results were there, where the loop has waited for them; `evaluation` will hold
        (mean, weight) pairs of held-out batches where one follows.
        """
        self._queue.put(
            _Pending(
                step=step,
                values=values,
                evaluation=evaluation,
                asked_at=asked_at,
                done_at=done_at,
                data_wait_seconds=data_wait_seconds,
            )
        )

    def drain(self, *, held: int = 0) -> None:
        """Return when every submitted step is written; raise what went wrong in one of them.

        `held` is the number of slots that the caller has and has not submitted a step for.
        """
        for _ in range(IN_FLIGHT - held):
            self._slots.acquire()
        for _ in range(IN_FLIGHT - held):
            self._slots.release()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread and the sinks; what was submitted is written first."""
        self._queue.put(None)
        self._thread.join()
        for sink in self._sinks:
            sink.close()

    def _collect(self) -> None:
        while (pending := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._write(pending)
            except BaseException as error:  # handed to the loop, which raises it
                self._error = error
            finally:
                self._slots.release()

    def _write(self, pending: _Pending) -> None:
        import jax

        values = _numbers(jax.device_get(_apart(pending.values)))
        done = time.perf_counter() if pending.done_at is None else pending.done_at
        seconds = done - max(self._last_done, pending.asked_at)
        self._last_done = done
        values.pop("weight", None)
        record = {
            "step": pending.step,
            **values,
            "step_seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "data_wait_seconds": pending.data_wait_seconds,
        }
        if self._stop_on_nan and not math.isfinite(values["loss"] + values["grad_norm"]):
            raise NotFinite(
                f"the loss of step {pending.step} is {values['loss']}, its gradient norm "
                f"{values['grad_norm']}; {NOT_KEPT}",
                pending.step,
            )
        if pending.evaluation is not None:
            record["eval_loss"] = _weighted_mean(jax.device_get(list(pending.evaluation.result())))
            self._last_done = time.perf_counter()
        self.last = record
        for sink in self._sinks:
            sink.write(record)


def check_metrics(shapes: Mapping[str, Any]) -> None:
    """Raise UserError for an aux value that cannot be logged; `shapes` are a step's metrics."""
    import jax.numpy as jnp

    for name, leaf in shapes.items():
        real = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
        if not real or math.prod(leaf.shape) > LOGGED:
            raise UserError(
                f"the loss's aux value {name!r} is {leaf.dtype}{list(leaf.shape)}; a log of steps holds real "
                f"numbers, up to {LOGGED} of one name: return its mean or norm, or leave it out"
            )


def _apart(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return aux values by names that are none of a record's own."""
    found = {name: value for name, value in values.items() if name not in _OWN}
    for name in _OWN:
        if name in values:
            found[f"aux/{name}"] = values[name]
    return found


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return one number for each scalar and for each item of an array, which is named by its place."""
    found = {}
    for name, value in values.items():
        if np.ndim(value) == 0:
            found[name] = float(value)
        else:
            found |= {f"{name}/{'/'.join(map(str, at))}": float(one) for at, one in np.ndenumerate(value)}
    return found


def _weighted_mean(pairs: Sequence[tuple[Any, Any]]) -> float:
    total = sum(float(weight) for _, weight in pairs)
    return sum(float(mean) * float(weight) for mean, weight in pairs) / max(total, 1.0)


class JsonLines:
    """Appends records to `metrics.jsonl`, one object a line, after those up to `start_step`."""

    def __init__(self, path: pathlib.Path, start_step: int) -> None:
        kept = [line for line, record in read_lines(path) if record["step"] <= start_step]
        write_whole(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; numbers that JSON cannot hold are written as null."""
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Writes every number of a record as a TensorBoard scalar under `folder`."""

    @staticmethod
    def check() -> None:
        """Raise UserError if the package that writes the events is not installed."""
        if importlib.util.find_spec("tensorboardX") is None:
            raise UserError(
                "metrics.tensorboard=true needs the package tensorboardX; "
                'pip install "meshwright[tensorboard]"'
            )

    def __init__(self, folder: pathlib.Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the record's scalars at its step."""
        for key, value in record.items():
            if key != "step":
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def read_lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (line, record) of every whole line of a metrics file; a last line cut short is left out."""
    # A crash can leave bytes that are no text, which are then no record either.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append((line, json.loads(line)))
        except json.JSONDecodeError:
            break
    return found
