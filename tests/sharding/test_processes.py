"""Child processes: tied to their parent, waited for, and ended with what they started."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from meshwright.sharding.processes import end_all, endings, fate, run, start, wait_all


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


# Starts a process of its own that shares its output, and says its number.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def gone(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def test_a_process_ends_with_the_one_that_started_it() -> None:
    source = f"""
import time
from meshwright.sharding.processes import start
print(start({python("import time; time.sleep(600)")!r}).pid, flush=True)
time.sleep(600)
"""
    parent = start(python(source), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    assert gone(child)


def test_what_a_process_started_ends_with_it() -> None:
    process = start(python(PARENT), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    end_all([process], grace_seconds=0)
    assert process.returncode == -signal.SIGKILL
    assert gone(grandchild)


def test_one_that_ignores_the_request_is_killed() -> None:
    source = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    stubborn = start(python(f"{source}; time.sleep(600)"), stdout=subprocess.PIPE)
    obedient = start(python("import time; print(1, flush=True); time.sleep(600)"), stdout=subprocess.PIPE)
    for process in (stubborn, obedient):
        assert process.stdout is not None
        process.stdout.readline()
    end_all([stubborn, obedient], grace_seconds=0.2)
    assert [stubborn.returncode, obedient.returncode] == [-signal.SIGKILL, -signal.SIGTERM]


def test_a_run_in_time_and_one_over_it() -> None:
    source = "import os, sys; print('out'); print(os.environ['MINE'], file=sys.stderr); sys.exit(3)"
    done = run(python(source), timeout_seconds=60, env=os.environ | {"MINE": "err"})
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    # Its child holds the pipes open: without its end there is none of them.
    start_seconds = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as error:
        run(python(PARENT), timeout_seconds=1)
    assert time.monotonic() - start_seconds < 20
    assert gone(int(error.value.stdout))


def test_a_command_that_is_not_there() -> None:
    done = run(["no-such-command"], timeout_seconds=60)
    assert done.returncode == 1
    assert done.stderr == "error: cannot start no-such-command: No such file or directory\n"


def test_endings_come_in_order_with_looks_between() -> None:
    # Each ends when it is told to, in whatever order they have started.
    waiting = "import os, sys; sys.stdin.read(); os.kill(os.getpid(), {}) if {} else None"
    processes = [start(python(waiting.format(n, n)), stdin=subprocess.PIPE) for n in (0, 0, 9)]
    seen: list[tuple[int, int]] = []
    looks = 0
    for ended in endings(processes, every_seconds=0.02):
        if ended is not None:
            seen.append(ended)
            looks = 0
        elif (looks := looks + 1) == 4:
            processes[(1, 2, 0)[len(seen)]].stdin.close()
    assert seen == [(1, 0), (2, -9), (0, 0)]
    assert list(endings([])) == []


def test_waiting_stops_in_time() -> None:
    process = start(python("import time; time.sleep(600)"))
    try:
        assert not wait_all([process], seconds=0.1)
    finally:
        end_all([process], grace_seconds=0)
    assert wait_all([process], seconds=0)
    assert fate(process.returncode) == "was ended by SIGKILL"


def test_a_signal_whose_handler_lasts_longer_than_a_look_does_not_end_the_looks() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: time.sleep(0.2))
    sleeper = start(python("import time; time.sleep(60)"))
    looks = endings([sleeper], every_seconds=0.1)
    last_resort = threading.Timer(20, sleeper.kill)
    last_resort.start()
    try:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        assert [next(looks), next(looks)] == [None, None]
    finally:
        last_resort.cancel()
        end_all([sleeper], grace_seconds=0)
        signal.signal(signal.SIGUSR1, before)
