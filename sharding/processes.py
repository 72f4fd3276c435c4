"""Child processes: tied to this one, waited for within a time limit, ended with all that they started.

The standard library alone is imported, so that whoever starts a process can use this.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Runs in front of each command: on Linux it has the kernel kill it when its parent ends, which lasts over
# `exec`, and becomes the command. In the child, because code between fork and exec is unsafe under threads.
_TIE = """
import ctypes, os, signal, sys
if sys.platform.startswith("linux"):
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"error: cannot start {sys.argv[2]}: {error.strerror}")
"""


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start `command` at the head of a session of its own, so that it can be ended with all that it starts.

    On Linux the kernel kills the process when this one ends, however it ends, or when the thread that called
    this does. `options` are those of `subprocess.Popen`; where they do not say otherwise the process reads
    nothing and writes its errors where its output goes. A command that is not there is told of in the output,
    with exit code 1.
    """
    tied = [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command]
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT} | options
    return subprocess.Popen(tied, start_new_session=True, **options)


def run(
    command: Sequence[str], *, timeout_seconds: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end and return its exit code, output and errors; see `start`.

    Raises subprocess.TimeoutExpired after `timeout_seconds`. Whatever it started has then ended too.

    >>> run([sys.executable, "-c", "print('done')"], timeout_seconds=60).stdout.strip()
    'done'
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    process = start(command, **pipes | options)
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    finally:
        end_all([process], grace_seconds=0)
    return subprocess.CompletedProcess(list(command), process.returncode, output, errors)


def endings(
    processes: Iterable[subprocess.Popen[Any]], *, every_seconds: float = 0.05
) -> Iterator[tuple[int, int] | None]:
    """Yield (place, return code) of each process as it ends, and None every `every_seconds` between.

    The iterator ends with the last process; None is the moment to look at limits and to leave the loop.
    """
    # No SimpleQueue: its `get` waits for ever once a signal handler returns past the time limit (CPython).
    ended: queue.Queue[tuple[int, int]] = queue.Queue()

    def wait_for(place: int, process: subprocess.Popen[Any]) -> None:
        ended.put((place, process.wait()))

    left = 0
    # A thread each, which tells the order of two that end within one look.
    for left, process in enumerate(processes, 1):
        threading.Thread(target=wait_for, args=(left - 1, process), daemon=True).start()
    while left:
        try:
            yield ended.get(timeout=every_seconds)
            left -= 1
        except queue.Empty:
            yield None


def fate(code: int) -> str:
    """Return what became of a process, as a predicate.

    >>> fate(-9), fate(7)
    ('was ended by SIGKILL', 'failed with exit code 7')
    """
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"failed with exit code {code}" if code else "ended with exit code 0"


def is_stopped(process: subprocess.Popen[Any]) -> bool:
    """Whether `process` is there and does not run: stopped by a signal or a debugger (known on Linux)."""
    try:
        with open(f"/proc/{process.pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "tT"
    except (OSError, IndexError):
        return False


def signal_group(process: subprocess.Popen[Any], number: int) -> None:
    """Send a signal to `process` and everything it started; it must lead its own session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def end_all(processes: Iterable[subprocess.Popen[Any]], *, grace_seconds: float) -> None:
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


def wait_all(processes: Iterable[subprocess.Popen[Any]], *, seconds: float) -> bool:
    """Wait until every process has ended; False when one still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True
