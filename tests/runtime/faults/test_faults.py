"""Stops, failures and hangs, in real processes that really stop, fail and hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from meshwright.runtime.faults.faults import StepWatchdog, StopSignal, is_lost_peer
from meshwright.sharding.errors import UserError


def start(source: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", source],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LOOP = """
import time
from meshwright.runtime.faults.faults import StopSignal
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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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


def test_hung_step_ends_with_stacks() -> None:
    process = start(
        """
import threading
from meshwright.runtime.faults.faults import StepWatchdog
def wait_for_a_peer():
    threading.Event().wait()
with StepWatchdog(0.5) as watchdog:
    with watchdog.paused():
        threading.Event().wait(0.8)
    watchdog.beat(7)
    print("after the pause")
    wait_for_a_peer()
"""
    )
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 70
    assert output == "after the pause\n"
    assert "in wait_for_a_peer" in errors
    assert "error: step 7 takes longer than train.step_timeout_seconds=0.5" in errors


def test_steps_in_time_do_not_bite() -> None:
    with StepWatchdog(0.4) as watchdog:
        for step in range(6):
            watchdog.beat(step)
            time.sleep(0.1)


def test_timeout_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="step_timeout_seconds=0 is not above 0"):
        StepWatchdog(0)


def test_lost_peer_is_told_from_other_errors() -> None:
    import jax

    gone = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:34567"
    assert is_lost_peer(jax.errors.JaxRuntimeError(gone))
    assert not is_lost_peer(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not is_lost_peer(ValueError("a peer"))


def test_an_error_of_a_single_process_is_raised_as_ever() -> None:
    from meshwright.runtime.faults.faults import fail_fast

    with pytest.raises(ZeroDivisionError), fail_fast():
        _ = 1 / 0
