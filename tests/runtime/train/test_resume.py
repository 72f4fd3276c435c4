"""A run that is killed, stopped or moved goes on as if nothing had happened: real processes, real signals."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from training import meshwright, metrics, saved_steps, start

pytestmark = pytest.mark.numerics

STEPS = 12


@pytest.fixture(scope="module")
def reference(small_config: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of the run that nothing happened to."""
    run = tmp_path_factory.mktemp("reference") / "run"
    finish(small_config, run)
    return run


def finish(config: pathlib.Path, run: pathlib.Path, *words: str) -> str:
    """Train to the end, and return what was printed."""
    result = meshwright("train", config, f"run={run}", *words)
    assert result.returncode == 0, result.stderr
    return result.stderr


def assert_same_course(run: pathlib.Path, reference: pathlib.Path, rel: float = 1e-6) -> None:
    """Every step is there once, with the loss and gradient norm of the run that nothing happened to."""
    ours, theirs = metrics(run), metrics(reference)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in ours] == pytest.approx([record[key] for record in theirs], rel=rel)


@contextlib.contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[str]]:
    """A `meshwright` that does not outlive the block."""
    process = start(*words)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """Read what `process` prints up to the line that holds `words`; return all of it."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if words in line:
            return printed
    raise AssertionError(f"{words!r} was never printed:\n{printed}")


def kill_during_a_save(process: subprocess.Popen[str], run: pathlib.Path) -> None:
    """Kill once a checkpoint is being written that no complete one of its step stands for yet."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(not path.name.isdigit() for path in (run / "checkpoints").iterdir() if path.is_dir()):
                break
        time.sleep(0.001)
    assert process.poll() is None, "the run ended before it was killed"
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL


def kill_after(process: subprocess.Popen[str], step: int, seconds: float) -> None:
    """Kill some time after `step` was printed, wherever that finds the process."""
    read_until(process, f"step {step}/{STEPS}")
    time.sleep(seconds)
    process.kill()
    process.wait(timeout=30)


def test_a_run_killed_during_a_save_goes_on(
    small_config: pathlib.Path, reference: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    with running("train", small_config, f"run={run}") as process:
        kill_during_a_save(process, run)
    finish(small_config, run)
    assert_same_course(run, reference)


@pytest.mark.slow
def test_a_run_killed_between_saves_goes_on(
    small_config: pathlib.Path, reference: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    with running("train", small_config, f"run={run}") as process:
        kill_after(process, 7, 0)
    assert max(saved_steps(run), default=0) < STEPS
    printed = finish(small_config, run)
    assert "going on from step" in printed
    assert_same_course(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(6))
def test_a_run_killed_at_any_moment_goes_on(
    small_config: pathlib.Path, reference: pathlib.Path, tmp_path: pathlib.Path, moment: int
) -> None:
    run, draw = tmp_path / "run", random.Random(moment)
    # With a save after every step one is under way at most moments.
    with running("train", small_config, f"run={run}", "checkpoint.every=1") as process:
        kill_after(process, draw.randrange(1, STEPS), draw.uniform(0, 0.4))
    finish(small_config, run)
    assert_same_course(run, reference)


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGTERM, "SIGTERM"), pytest.param(signal.SIGINT, "Ctrl-C", marks=pytest.mark.slow)],
)
def test_a_request_to_stop_saves_and_the_same_command_goes_on(
    small_config: pathlib.Path, reference: pathlib.Path, tmp_path: pathlib.Path, number: int, name: str
) -> None:
    run = tmp_path / "run"
    # No save is due before the last step, so that the one that is found was made for the request.
    words = ("train", small_config, f"run={run}", "checkpoint.every=0", "train.steps=2000")
    with running(*words) as process:
        read_until(process, "step 3/")
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0, printed
    assert f"stopped by {name}; the same command goes on from here" in printed
    (stopped_at,) = saved_steps(run)
    assert 3 <= stopped_at < 2000
    assert [record["step"] for record in metrics(run)] == list(range(1, stopped_at + 1))
    steps = stopped_at + 2
    printed = finish(small_config, run, f"train.steps={steps}")
    assert f"going on from step {stopped_at}" in printed
    assert [record["step"] for record in metrics(run)] == list(range(1, steps + 1))
    common = min(len(metrics(reference)), steps)
    ours = [record["loss"] for record in metrics(run)[:common]]
    assert ours == pytest.approx([record["loss"] for record in metrics(reference)[:common]], rel=1e-6)


def test_other_devices_and_another_mesh_go_on_with_the_same_losses(
    small_config: pathlib.Path, reference: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    finish(small_config, run, "train.steps=4")
    printed = finish(small_config, run, "topology=cpu:2", "mesh={tensor: 2}")
    assert "going on from step 4" in printed
    assert "on cpu:2 as tensor=2" in printed
    assert_same_course(run, reference, rel=1e-4)


@pytest.mark.slow
def test_a_request_to_stop_a_launch_saves_at_one_step(
    small_config: pathlib.Path, reference: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    words = (small_config, f"run={run}", "checkpoint.every=0")
    with running("launch", *words, "train.steps=2000", "--processes", 2) as process:
        read_until(process, "step 3/")
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0, printed
    (stopped_at,) = saved_steps(run)
    assert len(metrics(run)) == stopped_at
    # One process goes on with what two began.
    finish(small_config, run, "checkpoint.every=0", f"train.steps={stopped_at + 2}")
    common = min(STEPS, stopped_at + 2)
    ours = [record["loss"] for record in metrics(run)]
    assert len(ours) == stopped_at + 2
    assert ours[:common] == pytest.approx(
        [record["loss"] for record in metrics(reference)[:common]], rel=1e-4
    )


@pytest.mark.slow
def test_one_of_two_killed_ends_the_launch_with_the_cause(
    small_config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    words = ("launch", small_config, f"run={run}", "train.steps=2000", "--processes", 2)
    with running(*words) as process:
        read_until(process, "step 3/")
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        printed, _ = process.communicate(timeout=15)
    assert process.returncode == 128 + signal.SIGKILL
    assert "process 1 of 2 was ended by SIGKILL; the others were ended" in printed
    assert not [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()]


def children(pid: int) -> list[int]:
    """Processes that `pid` started, oldest first."""
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(word) for path in tasks for word in path.read_text().split())
