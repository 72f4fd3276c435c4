"""Processes of one job on this machine: a port they can meet at, and no orphan when the job ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

LOOPBACK = "127.0.0.1"

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a free TCP port of the loopback interface that nobody else is handed while the block runs.

    A coordinator that listens with SO_REUSEPORT, as JAX's does, may bind it all the same.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as keeper:
        if hasattr(socket, "SO_REUSEPORT"):
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind((LOOPBACK, 0))
        port = keeper.getsockname()[1]
        if not hasattr(socket, "SO_REUSEPORT"):
            keeper.close()
        yield port


def die_with_parent(parent: int) -> None:
    """Have this process killed when process `parent`, which started it, ends in any way (Linux only).

    Called by the child itself: code run between fork and exec is unsafe under a parent with threads.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to `process` and everything it started; it must lead its own session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def end_all(processes: Iterable[subprocess.Popen[bytes]], *, grace_seconds: float) -> None:
    """End each process group: SIGTERM, then SIGKILL for what is left after `grace_seconds`."""
    processes = list(processes)
    if grace_seconds > 0:
        for process in processes:
            if process.poll() is None:
                signal_group(process, signal.SIGTERM)
        wait_all(processes, seconds=grace_seconds)
    for process in processes:
        signal_group(process, signal.SIGKILL)
    for process in processes:
        process.wait()


def wait_all(processes: Iterable[subprocess.Popen[bytes]], *, seconds: float) -> bool:
    """Wait until every process has ended; False when one still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True
