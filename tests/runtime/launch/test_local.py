"""Launched processes: real ones, killed, stopped and orphaned for real."""

from __future__ import annotations

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from meshwright.runtime.launch import launch, launch_training
from meshwright.sharding.errors import UserError
from meshwright.sharding.processes import start

pytestmark = pytest.mark.numerics

# Joins the others, then sums over all devices again and again; stops when asked to.
TRAIN = """
import faulthandler, os, sys, time
faulthandler.dump_traceback_later(50)  # where it hangs, before whoever waits for it gives up
from meshwright.runtime.hosts import initialize
from meshwright.runtime.faults import StepWatchdog, StopSignal, fail_fast
from meshwright.runtime.config import HostsConfig
from meshwright.sharding.errors import UserError
from meshwright.sharding.processes import start
hosts = initialize(HostsConfig(heartbeat_seconds=10))
import jax, jax.numpy as jnp
mesh = jax.make_mesh((hosts.num_devices,), ("data",))
ones = jax.jit(lambda: jnp.ones(hosts.num_devices), out_shardings=jax.NamedSharding(mesh, jax.P("data")))()
total = jax.jit(jnp.sum)
with fail_fast(), StopSignal() as stop, StepWatchdog(4) as watchdog:
    for step in range(10_000):
        watchdog.beat(step)
        assert float(total(ones)) == hosts.num_devices
        if step == 3:
            print("pid", os.getpid(), "of", hosts.num_devices, "devices", flush=True)
        if "refuse" in sys.argv and step == 10:
            raise UserError("all of us were told nonsense")
        if "fail" in sys.argv and step == 10 and hosts.process_id == 1:
            raise ValueError("the model is unhappy")
        time.sleep(0.01)
        if stop.at(step):
            break
print("saved at", step)
"""

LAUNCHER = """
import sys
from meshwright.runtime.launch import launch
sys.exit(launch([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], 2, devices_per_process=2))
"""


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def run(source: str, count: int, **words: object) -> tuple[int, list[str]]:
    output = io.StringIO()
    code = launch(python(source), count, output=output, **words)  # pyright: ignore[reportArgumentType]
    return code, output.getvalue().splitlines()


class Launcher:
    """A launcher in a process of its own, with what it printed and the processes it told of."""

    def __init__(self, folder: pathlib.Path, *arguments: str) -> None:
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            self.process = start([*python(LAUNCHER), TRAIN, *arguments], stdout=log)

    def pids(self) -> list[int]:
        """Wait until both processes have taken steps; return their ids by number."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            told = sorted(line.split() for line in self.log.read_text().splitlines() if " pid " in line)
            if len(told) == 2:
                return [int(words[2]) for words in told]
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def finish(self, seconds: float) -> tuple[int, str]:
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds:g} s:\n{self.log.read_text()}") from None
        return code, self.log.read_text()


def alive(pid: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_one_of_two_killed_ends_both_and_says_so(tmp_path: pathlib.Path) -> None:
    launcher = Launcher(tmp_path)
    pids = launcher.pids()
    os.kill(pids[1], signal.SIGKILL)
    code, output = launcher.finish(15)
    assert code == 128 + signal.SIGKILL
    assert "meshwright launch: process 1 of 2 was ended by SIGKILL; the others were ended" in output
    assert f"    pid {pids[1]} of 4 devices" in output
    assert gone(pids, 1)


def test_an_error_in_one_ends_both_without_the_exit_barrier(tmp_path: pathlib.Path) -> None:
    launcher = Launcher(tmp_path, "fail")
    code, output = launcher.finish(60)
    assert code == 1
    assert "[1] ValueError: the model is unhappy" in output
    assert "meshwright launch: process 1 of 2 failed with exit code 1; the others were ended" in output


def test_a_mistake_that_all_see_is_one_sentence_of_each(tmp_path: pathlib.Path) -> None:
    launcher = Launcher(tmp_path, "refuse")
    code, output = launcher.finish(60)
    assert code == 2
    assert "[0] error: all of us were told nonsense" in output
    assert "[1] error: all of us were told nonsense" in output
    assert "Traceback" not in output
    assert "Check failure" not in output


def test_a_hung_process_is_noticed_and_ended(tmp_path: pathlib.Path) -> None:
    launcher = Launcher(tmp_path)
    pids = launcher.pids()
    os.kill(pids[1], signal.SIGSTOP)
    code, output = launcher.finish(30)
    assert code == 70
    assert "takes longer than train.step_timeout_seconds=4; this process hangs, or another one" in output
    assert "[0] Where each thread is:" in output
    # It is not the one that waited in vain.
    said = "process 1 of 2 was stopped by a signal or a debugger; process 0 of 2 failed with exit code 70"
    assert f"meshwright launch: {said}; the others were ended" in output
    assert f"meshwright launch: last lines of process 1:\n    pid {pids[1]} of 4 devices" in output
    assert gone(pids, 1)


def test_a_request_to_stop_reaches_all_once(tmp_path: pathlib.Path) -> None:
    launcher = Launcher(tmp_path)
    pids = launcher.pids()
    launcher.process.send_signal(signal.SIGINT)
    code, output = launcher.finish(60)
    assert code == 0, output
    saved = [line.partition("] ")[2] for line in output.splitlines() if "saved at" in line]
    assert len(saved) == 2
    assert len(set(saved)) == 1
    assert gone(pids, 1)


def test_a_killed_launcher_leaves_no_orphan(tmp_path: pathlib.Path) -> None:
    launcher = Launcher(tmp_path)
    pids = launcher.pids()
    launcher.process.kill()
    launcher.process.wait()
    assert gone(pids, 5)


def test_lines_are_numbered_and_whole() -> None:
    source = """
import os, sys
number = os.environ["MESHWRIGHT_PROCESS_ID"]
for part in ("one ", "line of ", number, "\\n", "bar 1\\rbar 2\\r", "no end"):
    sys.stdout.write(part); sys.stdout.flush()
"""
    chatter = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1"
    code, lines = run(f"print('{chatter}', '{chatter[12:]}', sep='\\n', flush=True)\n{source}", 3)
    assert code == 0
    expected = [
        f"[{n}] {text}" for n in range(3) for text in (f"one line of {n}", "bar 1", "bar 2", "no end")
    ]
    assert sorted(lines) == sorted(expected)


def test_first_failure_is_the_exit_code() -> None:
    source = """
import os, sys, time
if os.environ["MESHWRIGHT_PROCESS_ID"] == "0":
    time.sleep(60)
print("giving up"); sys.exit(7)
"""
    code, lines = run(source, 2)
    assert code == 7
    assert "meshwright launch: process 1 of 2 failed with exit code 7; the others were ended" in lines
    assert lines[-1] == "    giving up"


def test_the_last_lines_of_a_crash_say_what_it_was() -> None:
    source = r"""
import os, sys, time
print("the tasks are unhealthy: 1\n*** Check failure stack trace: ***")
print("\n".join(f"    @     0x7f280d65863{n}  absl::Flush()" for n in range(9)))
sys.stdout.flush(); os.abort()
"""
    code, lines = run(source, 1)
    assert code == 128 + signal.SIGABRT
    assert lines[-1] == "    the tasks are unhealthy: 1"
    assert "[0]     @     0x7f280d658638  absl::Flush()" in lines


def test_one_that_jax_no_longer_hears_is_named_before_the_one_that_gave_up() -> None:
    crash = """
import os, time
if os.environ["MESHWRIGHT_PROCESS_ID"] == "1":
    print("on a machine that is frozen", flush=True)
    time.sleep(60)
time.sleep(1)
said = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):"
print(said, "1", "Crashed.", sep="\\n")
os.abort()
"""
    code, lines = run(crash, 2, failure_grace_seconds=0.1)
    assert code == 128 + signal.SIGABRT
    assert lines[-3:] == [
        "meshwright launch: process 1 of 2 was not heard from any more; process 0 of 2 was ended by SIGABRT; "
        "the others were ended",
        "meshwright launch: last lines of process 1:",
        "    on a machine that is frozen",
    ]


def test_one_that_ignores_sigterm_is_killed() -> None:
    source = """
import os, signal, sys, time
if os.environ["MESHWRIGHT_PROCESS_ID"] == "1":
    time.sleep(0.5); sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""
    assert run(source, 2, failure_grace_seconds=0.3)[0] == 3


def test_devices_and_environment_reach_the_processes() -> None:
    source = (
        "import os; print(os.environ['JAX_NUM_CPU_DEVICES'], os.environ['JAX_PLATFORMS'], os.environ['MINE'])"
    )
    assert run(source, 1, devices_per_process=4, environment={"MINE": "x"}) == (0, ["[0] 4 cpu x"])


def test_a_command_that_is_not_there() -> None:
    output = io.StringIO()
    assert launch(["no-such-command"], 1, output=output) == 1
    assert "[0] error: cannot start no-such-command: No such file or directory" in output.getvalue()


@pytest.mark.parametrize("words", [{"num_processes": 0}, {"num_processes": 1, "devices_per_process": 0}])
def test_counts_below_one_are_refused(words: dict[str, int]) -> None:
    with pytest.raises(UserError, match="is below 1"):
        launch(python("pass"), **words)  # pyright: ignore[reportArgumentType]


def test_a_wrong_config_starts_nothing(tmp_path: pathlib.Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("train: {stepps: 3}\n")
    with pytest.raises(UserError, match="stepps"):
        launch_training(config, [], 2)
    with pytest.raises(UserError, match="no config file"):
        launch_training(tmp_path / "b.yaml", [], 2)
