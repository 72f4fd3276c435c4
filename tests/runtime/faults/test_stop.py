"""Requests to stop, in real processes that really get a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from forks import forked
from meshwright.runtime.faults import StopSignal
from meshwright.sharding import processes


def start(source: str) -> subprocess.Popen[str]:
    environment, pipe = os.environ | {"JAX_PLATFORMS": "cpu"}, subprocess.PIPE
    command = forked([sys.executable, "-u", "-c", source])
    return processes.start(command, env=environment, stdout=pipe, stderr=pipe, text=True)


LOOP = """
import time
from meshwright.runtime.faults import StopSignal
with StopSignal() as stop:
    for step in range(10_000):
        print("step", step, flush=True)
        time.sleep(0.02)
        if stop.at(step):
            print("stopped by", stop.reason)
            break
print("saved")
"""


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_signal_stops_after_the_step(number: int, name: str) -> None:
    process = start(LOOP)
    assert process.stdout is not None
    assert process.stdout.readline() == "step 0\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert output.endswith(f"stopped by {name}\nsaved\n")
    assert f"{name}: stopping after this step" in errors


# Waits in C without coming back to Python's handlers, as a collective does whose other side hangs.
STUCK = (
    "import ctypes; lock = ctypes.CDLL(None).pthread_mutex_lock; mutex = ctypes.create_string_buffer(64); "
    "lock(mutex); lock(mutex)"
)


def test_second_interrupt_ends_at_once() -> None:
    process = start(LOOP.replace("time.sleep(0.02)", STUCK))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again stops at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "saved" not in output


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.at(0)
        stop.request("enough")
        assert stop.at(1)
        assert stop.reason == "enough"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.processes(2, timeout_seconds=90)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_all_processes_stop_at_the_same_step(number: int, shared_path) -> None:
    import jax

    me = jax.process_index()
    with StopSignal() as stop:
        for step in range(2_000):
            if me == 1 and step == 20:
                os.kill(os.getpid(), number)
            time.sleep(0.005 * (1 + me))
            if stop.at(step):
                break
    (shared_path / f"{me}").write_text(str(step))
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("written")
    assert step < 1_999
    assert (shared_path / "0").read_text() == (shared_path / "1").read_text()
    assert stop.reason is not None
