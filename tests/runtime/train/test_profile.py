"""A profile never hurts a run: processes that are killed within the window, and runs with and without one."""

from __future__ import annotations

import pathlib
import signal
import time

import pytest
from training import meshwright, metrics, saved_steps, start

pytestmark = pytest.mark.numerics

# Long enough a window, and slow enough steps, that the process is surely killed within it.
WINDOW = ("profile.start_step=4", "profile.num_steps=20")
SETTINGS = ("train.steps=26", "train.global_batch=64", "checkpoint.every=0")


def capturing(run: pathlib.Path) -> list[pathlib.Path]:
    return list((run / "profile").glob("capturing_*"))


@pytest.mark.slow
def test_a_process_that_died_in_its_window_goes_on_without_it_and_says_so(
    small_config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    words = (small_config, *SETTINGS, *WINDOW, f"run={run}")
    process = start("train", *words)
    try:
        deadline = time.monotonic() + 120
        while not capturing(run) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=30)
    (left,) = capturing(run)
    # What was trained up to the window was saved before it, though nothing else asked for it.
    assert saved_steps(run) == [3]

    again = meshwright("train", *words)
    assert again.returncode == 0, again.stderr
    assert f"no profile is captured: a process died in or after its window before ({left})" in again.stderr
    assert "going on from step 3" in again.stderr
    assert not list((run / "profile").rglob("*.xplane.pb"))
    assert [record["step"] for record in metrics(run)] == list(range(1, 27))


@pytest.mark.slow
def test_two_windows_and_three_saves_change_no_loss(
    small_config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    plain, run = tmp_path / "plain", tmp_path / "run"
    late = ("train.steps=60", "profile.start_step=61")
    result = meshwright("train", small_config, *late, "checkpoint.every=0", f"run={plain}")
    assert result.returncode == 0, result.stderr
    assert "no profile: profile.start_step=61 is past train.steps=60" in result.stderr
    for steps, first in ((30, 10), (60, 40)):
        window = (f"train.steps={steps}", f"profile.start_step={first}", "profile.num_steps=3")
        result = meshwright("train", small_config, *window, "checkpoint.every=20", f"run={run}")
        assert result.returncode == 0, result.stderr
        assert f"profile: steps {first} to {first + 2} captured" in result.stderr
        assert not capturing(run)
    assert [r["loss"] for r in metrics(run)] == pytest.approx([r["loss"] for r in metrics(plain)], rel=1e-6)
