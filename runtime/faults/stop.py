"""A request to stop, heard in any process and obeyed by all after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from typing import Self

from ..errors import EXIT_INTERRUPTED
from .failure import print_now


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
            print_now("stopped at once; steps since the last checkpoint are lost\n")
            os._exit(EXIT_INTERRUPTED)
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        if self.reason is None:
            print_now(f"{name}: stopping after this step{again}\n")
        self.request(name)
