"""The runs for one card, tried in their reduced form."""

from __future__ import annotations

import csv
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
from forks import forked
from meshwright.sharding.processes import run

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def half(name: str, out: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run a half whose ten processes start as forks."""
    python = out / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.join(forked([sys.executable]))} "$@"\n')
    python.chmod(0o755)
    words = ["bash", str(SCRIPT), name, str(out), "--small"]
    return run(words, timeout_seconds=590, env=os.environ | {"PYTHON": str(python)})


def test_a_half_that_does_not_exist_is_refused(tmp_path: pathlib.Path) -> None:
    for script in (SCRIPT, SCRIPT.parent / "gpu" / "collect.sh"):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert run(["bash", str(SCRIPT)], timeout_seconds=20).returncode == 1


@pytest.mark.slow
@pytest.mark.numerics
def test_the_first_half_leaves_traces_and_shows_that_a_profile_changes_no_loss(
    tmp_path: pathlib.Path,
) -> None:
    done = half("first", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "losses of 60 steps, with profiles and saves and without: at most" in done.stdout
    assert len(list(tmp_path.glob("*.xplane.pb.gz"))) == 2
    assert "operations placed" in (tmp_path / "profile.txt").read_text()


@pytest.mark.slow
@pytest.mark.numerics
def test_the_second_half_leaves_rows_and_the_loops_cost(tmp_path: pathlib.Path) -> None:
    done = half("second", tmp_path)
    assert done.returncode == 0, done.stdout
    with (tmp_path / "rows.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    own = ROOT / "benchmarks" / "measured" / "own_gpu_runs.csv"
    assert list(rows["whole"]) == own.read_text().splitlines()[0].split(",")
    assert float(rows["deep"]["measured_step_seconds"]) > 0
    assert "the compiled step alone" in (tmp_path / "overhead.txt").read_text()
