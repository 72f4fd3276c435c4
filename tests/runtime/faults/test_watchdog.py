"""Steps that hang, in real processes that really hang."""

from __future__ import annotations

import sys
import time

import pytest
from meshwright.runtime.faults import StepWatchdog
from meshwright.sharding.errors import UserError
from meshwright.sharding.processes import run


def test_hung_step_ends_with_stacks() -> None:
    source = """
import threading
from meshwright.runtime.faults import StepWatchdog
def wait_for_a_peer():
    threading.Event().wait()
with StepWatchdog(0.5) as watchdog:
    with watchdog.paused():
        threading.Event().wait(0.8)
    watchdog.beat(7)
    print("after the pause")
    wait_for_a_peer()
"""
    done = run([sys.executable, "-u", "-c", source], timeout_seconds=30)
    assert (done.returncode, done.stdout) == (70, "after the pause\n")
    assert "in wait_for_a_peer" in done.stderr
    assert "error: step 7 takes longer than train.step_timeout_seconds=0.5" in done.stderr


def test_steps_in_time_do_not_bite() -> None:
    with StepWatchdog(0.4) as watchdog:
        for step in range(6):
            watchdog.beat(step)
            time.sleep(0.1)


def test_timeout_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="step_timeout_seconds=0 is not above 0"):
        StepWatchdog(0)
