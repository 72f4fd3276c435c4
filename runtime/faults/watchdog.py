"""The end of a process whose step hangs, with the stacks of its threads."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from ...sharding.errors import UserError
from ..errors import EXIT_HUNG
from .failure import end_now, print_now


class StepWatchdog:
    """Ends the process, with the stacks of all its threads, when a step takes longer than `timeout_seconds`.

    A process that waits for a hung one can do nothing else: it is inside a collective that never returns.
    `beat` starts the time of a step; `paused` takes out what may rightly last (a compilation, a last save).
    """

    def __init__(self, timeout_seconds: float) -> None:
        if timeout_seconds <= 0:
            raise UserError(f"train.step_timeout_seconds={timeout_seconds:g} is not above 0")
        self._timeout_seconds = timeout_seconds
        self._step: int | None = None
        self._since = time.monotonic()
        self._pauses = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="step watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """Say that `step` begins now."""
        self._step, self._since = step, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent in the block out of account."""
        self._pauses += 1
        try:
            yield
        finally:
            self._since = time.monotonic()
            self._pauses -= 1

    def _watch(self) -> None:
        interval = min(1.0, self._timeout_seconds / 4)
        looked = time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            # A machine that slept, or a process that was stopped and continued, did not hang meanwhile.
            self._since += max(0.0, now - looked - 10 * interval)
            looked = now
            if self._step is not None and not self._pauses and now - self._since > self._timeout_seconds:
                self._bite()

    def _bite(self) -> None:
        sys.stdout.flush()
        print_now("Where each thread is:\n")
        faulthandler.dump_traceback(file=2, all_threads=True)
        print_now(
            f"error: step {self._step} takes longer than train.step_timeout_seconds="
            f"{self._timeout_seconds:g}; this process hangs, or another one that it waits for\n"
        )
        end_now(EXIT_HUNG)
