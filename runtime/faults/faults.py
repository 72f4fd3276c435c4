"""Ending a run well: on request at a step that all processes agree on, or at once when one of them fails.

with fail_fast(), StopSignal() as stop, StepWatchdog(config.train.step_timeout_seconds) as watchdog:
    for step in range(first, last):
        watchdog.beat(step)
        …
        if stop.at(step):
            break
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from ...sharding.errors import UserError
from ..errors import RunError

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_HUNG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 128 + signal.SIGINT

# Process 0 holds the coordination service: once it is gone JAX aborts the others amid what they have to say.
_LAST_TO_LEAVE_SECONDS = 1.0

# How an error reads that only says that another process is gone (gloo, NCCL, the coordination service).
_PEER_GONE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|peer|heartbeat|coordination ?service|UNAVAILABLE",
    re.IGNORECASE,
)


class StopSignal:
    """Turns SIGTERM or Ctrl-C, in any process, into a stop after the same step in all of them.

    While the block runs, the first Ctrl-C asks for the stop and a second one ends the process at once.
    Only the main thread may install signal handlers; in another one the signals keep their meaning.

    A thread of its own hears the signals, because Python runs a handler only when the main thread comes back
    from C, which it does not while it waits for a process that hangs.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._agreed = False
        self._interrupts = 0
        self._shared = False
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        import jax

        self._shared = jax.process_count() > 1
        if threading.current_thread() is threading.main_thread():
            # With several processes SIGTERM is JAX's own: its handler tells all the others.
            self._hear([signal.SIGINT] if self._shared else [signal.SIGINT, signal.SIGTERM])
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _hear(self, numbers: list[int]) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        ear = threading.Thread(target=self._listen, args=(ours,), name="stop signals", daemon=True)
        self._cleanup.callback(ours.close)
        self._cleanup.callback(ear.join)
        self._cleanup.callback(theirs.close)
        self._cleanup.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs.fileno()))
        for number in numbers:
            self._cleanup.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        ear.start()

    def _listen(self, ours: socket.socket) -> None:
        while words := ours.recv(64):
            for number in words:
                self._on_signal(number)

    def at(self, step: int) -> bool:
        """Say whether to stop after `step`; every process must ask once for each step, counting alike.

        Costs microseconds: with several processes it is a look at what JAX's coordination service has sent.
        """
        if not self._shared:
            return self.reason is not None
        if not self._agreed:
            from jax.experimental import multihost_utils

            self._agreed = multihost_utils.reached_preemption_sync_point(step)
            if self._agreed:
                self.reason = self.reason or "SIGTERM to one of the processes"
        return self._agreed

    def request(self, reason: str) -> None:
        """Ask all processes to stop, as SIGTERM to this one would."""
        self.reason = self.reason or reason
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGTERM and self._shared:
            return
        if number == signal.SIGINT:
            self._interrupts += 1
        if self._interrupts > 1:
            _write("stopped at once; steps since the last checkpoint are lost\n")
            os._exit(EXIT_INTERRUPTED)
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        if self.reason is None:
            _write(f"{name}: stopping after this step{again}\n")
        self.request(name)


@contextlib.contextmanager
def fail_fast() -> Iterator[None]:
    """End the whole process, not only the block, on an error in a run of several processes.

    An error that is raised on instead meets JAX's exit barrier, which waits more than a minute for processes
    that are waiting for this one. With a single process the error is raised as ever.
    """
    try:
        yield
    except BaseException as error:
        import jax

        if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        _tell(error, jax.process_index())
        if jax.process_index() == 0:
            time.sleep(_LAST_TO_LEAVE_SECONDS)
        end_now(_exit_code(error))


def end_now(code: int) -> None:
    """Leave this process with `code` after flushing what was printed and logged, past every exit handler."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _tell(error: BaseException, process_id: int) -> None:
    if isinstance(error, (UserError, RunError)):
        print(f"error: {error}", file=sys.stderr)
        return
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return
    traceback.print_exception(error)
    if is_lost_peer(error):
        print(
            f"process {process_id} lost another process of this run; the cause is in that one's output",
            file=sys.stderr,
        )


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether `error` comes from XLA and only says that another process is gone."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and _PEER_GONE.search(str(error)) is not None


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
        _write("Where each thread is:\n")
        faulthandler.dump_traceback(file=2, all_threads=True)
        _write(
            f"error: step {self._step} takes longer than train.step_timeout_seconds="
            f"{self._timeout_seconds:g}; this process hangs, or another one that it waits for\n"
        )
        end_now(EXIT_HUNG)


def _write(words: str) -> None:
    """Print to stderr past its buffer and its lock, which a thread that hangs may hold."""
    with contextlib.suppress(OSError):
        os.write(2, words.encode())
