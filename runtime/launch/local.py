"""All processes of a run on this machine, over loopback: started, listened to and ended together."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, TextIO

from ...sharding.errors import UserError
from ...sharding.processes import end_all, endings, fate, is_stopped, start
from ..config import load
from ..hosts import clusters
from ..hosts.address import LOOPBACK, reserved_port

_LAST_LINES = 12
_COLOURS = ("36", "33", "35", "32", "34", "31")
_LINE_END = re.compile(rb"\r\n|\n|\r")
# Gloo prints a line for every device that meets another, with no way to turn it off; two can run together.
_CHATTER = re.compile(rb"\[Gloo\] Rank |\d+ is connected to \d+ peer ranks\. ")
# What JAX's coordinator says before the numbers, a line each, of those that it no longer hears.
_UNHEARD = "stopped sending heartbeats"
_TASK = re.compile(r"\s*(?:\S*/task:)?(\d+)\s*")
# Of a crash what stands before its stack says what it was.
_OF_A_STACK = re.compile(r"\s*@\s+0x[0-9a-f]+\s|\*\*\* Check failure stack trace")


def launch_training(config: str | os.PathLike[str], overrides: Sequence[str], num_processes: int) -> int:
    """Train `config` in `num_processes` processes on this machine; return the exit code.

    Raises UserError, before any process starts, for what is wrong in the config itself.
    """
    load(os.fspath(config), overrides)
    train = [sys.executable, "-m", "meshwright.runtime.cli", "train", os.fspath(config), *overrides]
    return launch(train, num_processes)


def launch(
    command: Sequence[str],
    num_processes: int,
    *,
    devices_per_process: int | None = None,
    environment: Mapping[str, str] | None = None,
    output: TextIO | None = None,
    failure_grace_seconds: float = 5.0,
    stop_grace_seconds: float = 120.0,
) -> int:
    """Run `command` in `num_processes` processes that `distributed.initialize` joins; return the exit code.

    Every line that a process prints comes out with its number in front. SIGINT and SIGTERM are passed on
    once, and the processes have `stop_grace_seconds` to save and leave. When one fails the others are ended,
    after `failure_grace_seconds` by force, and what became of the first is printed: its exit code (128 + the
    signal that ended it) is the result. One that was stopped, and that JAX no longer hears, is named before
    those that failed because they waited for it. No process outlives this one, whatever ends it (on Linux).

    `devices_per_process` simulated CPU devices are given to each; None leaves that to the command.
    """
    if num_processes < 1:
        raise UserError(f"--processes {num_processes} is below 1; nearest: 1")
    if devices_per_process is not None and devices_per_process < 1:
        raise UserError(f"{devices_per_process} devices per process is below 1; nearest: 1")
    printer = _Printer(output or sys.stdout, num_processes)
    processes: list[subprocess.Popen[Any]] = []
    with reserved_port() as port:
        try:
            for number in range(num_processes):
                words = _environment(number, num_processes, port, devices_per_process, environment or {})
                processes.append(start(command, env=words, stdout=subprocess.PIPE))
            return _Job(processes, printer, failure_grace_seconds, stop_grace_seconds).run()
        finally:
            end_all(processes, grace_seconds=0)


def _environment(
    number: int, count: int, port: int, devices: int | None, more: Mapping[str, str]
) -> dict[str, str]:
    words = dict(os.environ) | {
        clusters.COORDINATOR: f"{LOOPBACK}:{port}",
        clusters.NUM_PROCESSES: str(count),
        clusters.PROCESS_ID: str(number),
        "PYTHONUNBUFFERED": "1",
    }
    if devices is not None:
        words |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return words | dict(more)


class _Printer:
    """Puts whole lines of several processes on one stream, each with its number in front."""

    def __init__(self, output: TextIO, count: int) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._width = len(str(count - 1))
        self._colour = output.isatty() and "NO_COLOR" not in os.environ
        self.last: list[deque[str]] = [deque(maxlen=_LAST_LINES) for _ in range(count)]

    def line(self, number: int, text: str) -> None:
        """Print a line of process `number`, and remember it among its last ones, but for stacks of C++."""
        if not _OF_A_STACK.match(text):
            self.last[number].append(text)
        mark = f"[{number:{self._width}}]"
        if self._colour:
            mark = f"\x1b[{_COLOURS[number % len(_COLOURS)]}m{mark}\x1b[0m"
        self.say(f"{mark} {text}")

    def say(self, text: str) -> None:
        """Print a line of the launcher's own."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._output.write(text + "\n")
            self._output.flush()

    def copy(self, number: int, stream: IO[bytes]) -> None:
        """Print what process `number` writes until it ends; a bar's carriage return ends a line too."""
        rest = b""
        while chunk := os.read(stream.fileno(), 65536):
            *lines, rest = _LINE_END.split(rest + chunk)
            for line in lines:
                if line and not _CHATTER.match(line):
                    self.line(number, line.decode(errors="replace"))
        if rest:
            self.line(number, rest.decode(errors="replace"))


class _Job:
    """Processes that run together; ends as the first that fails does."""

    def __init__(
        self,
        processes: Sequence[subprocess.Popen[Any]],
        printer: _Printer,
        failure_grace_seconds: float,
        stop_grace_seconds: float,
    ) -> None:
        self._processes = processes
        self._printer = printer
        self._failure_grace_seconds = failure_grace_seconds
        self._stop_grace_seconds = stop_grace_seconds
        self._requests: list[int] = []

    def run(self) -> int:
        """Wait for all, or for the first failure; return the exit code of the whole."""
        readers = [self._follow(number, process) for number, process in enumerate(self._processes)]
        with self._signals_noted():
            failed = self._wait()
        stopped: list[int] = []
        if failed is not None:
            stopped = [number for number, process in enumerate(self._processes) if is_stopped(process)]
            self._end_others(failed[0])
        for reader in readers:
            reader.join(timeout=2)
        if failed is None:
            return 0
        return self._explain(*failed, stopped)

    def _follow(self, number: int, process: subprocess.Popen[Any]) -> threading.Thread:
        reader = threading.Thread(target=self._printer.copy, args=(number, process.stdout), daemon=True)
        reader.start()
        return reader

    def _wait(self) -> tuple[int, int] | None:
        """Return (number, return code) of the first process that fails, None when all end well."""
        passed_on, deadline = 0, float("inf")
        for ended in endings(self._processes):
            if ended is not None and ended[1] != 0:
                return ended
            if len(self._requests) > passed_on:
                if passed_on and self._requests[-1] == signal.SIGINT:
                    return self._give_up("stopped at once")
                if not passed_on:
                    self._pass_on(self._requests[0])
                    deadline = time.monotonic() + self._stop_grace_seconds
                passed_on = len(self._requests)
            if time.monotonic() > deadline:
                return self._give_up(f"still there {self._stop_grace_seconds:g} s after the request to stop")
        return None

    def _pass_on(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _give_up(self, reason: str) -> tuple[int, int]:
        late = [number for number, process in enumerate(self._processes) if process.poll() is None]
        self._printer.say(
            f"meshwright launch: {reason}; ending process {', '.join(map(str, late)) or 'none'}"
        )
        end_all(self._processes, grace_seconds=0)
        return (late[0] if late else 0), -self._requests[-1]

    def _end_others(self, failed: int) -> None:
        others = [process for number, process in enumerate(self._processes) if number != failed]
        end_all(others, grace_seconds=self._failure_grace_seconds)

    def _explain(self, number: int, code: int, stopped: Sequence[int]) -> int:
        count = len(self._processes)
        others = "" if count == 1 else "; the others were ended"
        silent, why = stopped, "was stopped by a signal or a debugger"
        if not silent:
            silent, why = _unheard(self._printer.last[number], count), "was not heard from any more"
        first = next((one for one in silent if one != number), number)
        waited = "" if first == number else f"process {first} of {count} {why}; "
        self._printer.say(f"meshwright launch: {waited}process {number} of {count} {fate(code)}{others}")
        if self._printer.last[first]:
            self._printer.say(f"meshwright launch: last lines of process {first}:")
            for line in self._printer.last[first]:
                self._printer.say(f"    {line}")
        return 128 - code if code < 0 else code

    @contextlib.contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM instead of obeying them; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, lambda number, _: self._requests.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _unheard(lines: Sequence[str], count: int) -> list[int]:
    """Return the numbers of processes, of `count`, that JAX's coordinator no longer hears by these lines."""
    found: list[int] = []
    listing = False
    for line in lines:
        match = _TASK.fullmatch(line)
        listing = _UNHEARD in line or (listing and match is not None)
        if listing and match is not None and int(match[1]) < count:
            found.append(int(match[1]))
    return found
