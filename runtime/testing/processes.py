"""The body of one test in several real processes: who starts them, and who runs in each of them."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import pytest

from ...sharding.processes import end_all, endings, fate, signal_group, start, wait_all
from ..hosts.address import LOOPBACK, reserved_port
from ..hosts.simulated import enough_threads

RANK = "MESHWRIGHT_TEST_RANK"
FOLDER = "MESHWRIGHT_TEST_FOLDER"
_JOB = "MESHWRIGHT_TEST_JOB"

# What a rank that has not failed yet gets to finish in, once another has: it may be about to say more.
_GRACE_SECONDS = 2.0
# An error in one process leaves the others waiting in a collective; they are told by this time.
_HEARTBEAT_SECONDS = 10


def run_in_processes(item: pytest.Item, count: int, devices: int, timeout_seconds: float) -> None:
    """Run `item` in `count` processes with `devices` each; fail with what every failed one printed."""
    with tempfile.TemporaryDirectory(prefix="meshwright-test-") as name, reserved_port() as port:
        folder = pathlib.Path(name)
        processes: list[subprocess.Popen[Any]] = []
        try:
            for rank in range(count):
                job = f"{LOOPBACK}:{port} {count} {devices} {timeout_seconds}"
                processes.append(_start(item, rank, job, folder))
            story = _watch(processes, timeout_seconds)
        finally:
            end_all(processes, grace_seconds=0)
        _judge(item, folder, story)


def _start(item: pytest.Item, rank: int, job: str, folder: pathlib.Path) -> subprocess.Popen[Any]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTEST_XDIST") and name not in ("PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS")
    }
    environment |= {RANK: str(rank), FOLDER: str(folder), _JOB: job, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(folder / f"rank{rank}.log", "wb") as log:
        command = [sys.executable, "-P", "-m", "pytest", *_arguments(item, folder / f"rank{rank}")]
        return start(command, cwd=item.config.invocation_params.dir, env=environment, stdout=log)


def _arguments(item: pytest.Item, scratch: pathlib.Path) -> list[str]:
    """Pytest's arguments that find this item again, with the settings and plugins of the present run."""
    config = item.config
    selector = f"{item.path}::{item.nodeid.split('::', 1)[1]}"
    arguments = [selector, "-q", "--no-header", "--runxfail", "-m", "", "-k", "", "--basetemp", str(scratch)]
    arguments += ["--rootdir", str(config.rootpath), "--color=no", "-p", "no:cacheprovider"]
    arguments += ["-c", str(config.inipath)] if config.inipath else []
    arguments += [f"--tb={config.option.tbstyle}"] if config.option.tbstyle != "auto" else []
    arguments += [word for plugin in config.option.plugins for word in ("-p", plugin)]
    arguments += [word for setting in config.option.override_ini or () for word in ("-o", setting)]
    arguments += ["-n0"] if config.pluginmanager.hasplugin("xdist") else []
    return arguments


def _watch(processes: list[subprocess.Popen[Any]], timeout_seconds: float) -> list[tuple[int, str]]:
    """Return (rank, what became of it) for each rank that did not pass, first failure first."""
    deadline = time.monotonic() + timeout_seconds
    waiting = dict(enumerate(processes))
    story: list[tuple[int, str]] = []
    for ended in endings(processes):
        if ended is not None:
            rank, code = ended
            del waiting[rank]
            if code != 0:
                if not story:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                story.append((rank, "failed" if code == 1 else fate(code)))
        if time.monotonic() > deadline:
            break
    late = "was ended" if story else f"still ran after {timeout_seconds:g} s; it was killed"
    for rank, process in waiting.items():
        story.append((rank, late))
        signal_group(process, signal.SIGABRT)  # Pytest's faulthandler prints where each thread stood.
    wait_all(waiting.values(), seconds=2)
    return story


def _judge(item: pytest.Item, folder: pathlib.Path, story: list[tuple[int, str]]) -> None:
    if not story:
        skipped = sorted(folder.glob("skipped*"))
        if skipped:
            pytest.skip(skipped[0].read_text(encoding="utf-8"))
        return
    first = ", ".join(f"rank {rank} {fate}" for rank, fate in story)
    lines = [f"{item.name}: {first}"]
    for rank, _ in story:
        log = (folder / f"rank{rank}.log").read_text(encoding="utf-8", errors="replace")
        lines += [f"[{rank}] {line}" for line in log.splitlines()]
    pytest.fail("\n".join(lines), pytrace=False)


class Rank:
    """Pytest plugin inside one of the processes: joins the others before anything else."""

    def __init__(self) -> None:
        coordinator, count, devices, timeout_seconds = os.environ.pop(_JOB).split()
        self._rank = int(os.environ[RANK])
        self._status = 0
        import jax

        jax.config.update("jax_platforms", "cpu")
        enough_threads(int(devices))
        jax.config.update("jax_num_cpu_devices", int(devices))
        if int(count) > 1:
            jax.distributed.initialize(
                coordinator,
                int(count),
                self._rank,
                cluster_detection_method="deactivate",
                coordinator_bind_address=coordinator,
                initialization_timeout=max(1, int(float(timeout_seconds))),
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Leave a note for the parent when the test skips itself."""
        if report.skipped and isinstance(report.longrepr, tuple):
            note = pathlib.Path(os.environ[FOLDER]) / f"skipped{self._rank}"
            note.write_text(report.longrepr[2].removeprefix("Skipped: "), encoding="utf-8")

    def pytest_sessionfinish(self, exitstatus: Any) -> None:
        """Remember how it went."""
        self._status = int(exitstatus)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Leave at once after a failure: JAX's exit barrier would wait for ranks that never come."""
        if self._status != 0:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._status)
