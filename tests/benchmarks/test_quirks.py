"""Facts of compilers are seen again in small programs, and rows that would change are said."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from meshwright.sharding import Topology

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def quirks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("quirks")


def test_the_compiler_for_simulated_devices_does_what_is_recorded() -> None:
    command = [sys.executable, BENCHMARKS / "quirks.py", "--only", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.count("as recorded") == 8
    assert "aligned_elements of xla:gpu: no small program shows it" in done.stdout


def test_what_a_row_would_have_to_say(quirks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology.parse("v5p:4x4x4")
    monkeypatch.setattr(quirks, "versions", lambda topology: {"libtpu": "9.9"})
    assert quirks.advice("tile_rows", topology, 16) == '[[tile_rows]] of libtpu: add "9.9" to versions'
    assert quirks.advice("host_is_device", topology, False) == ""
    changed = quirks.advice("scatters_planes", topology, False)
    assert changed.startswith("not true on v5p: [[scatters_planes]]")
    assert 'versions = ["9.9"], value = false' in changed
