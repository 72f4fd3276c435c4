"""Fingerprints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import zoo
from meshwright.sharding.program import trace

_TESTS = Path(__file__).parents[2]
_PRINT = """
import zoo
from meshwright.sharding.program import trace
case = zoo.unet()
print(trace(case.loss, *case.shapes()).fingerprint)
"""


def fingerprint(case) -> str:
    return trace(case.loss, *case.shapes()).fingerprint


def test_another_process_agrees():
    ran = subprocess.run(
        [sys.executable, "-c", _PRINT], cwd=_TESTS, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split()[-1] == fingerprint(zoo.unet())


def test_it_changes_with_sizes_and_structure():
    prints = {
        fingerprint(case) for case in (zoo.lstm(), zoo.lstm(scale=2), zoo.decoder(), zoo.decoder(layers=3))
    }
    assert len(prints) == 4


def test_it_does_not_change_from_one_tracing_to_the_next():
    assert fingerprint(zoo.decoder()) == fingerprint(zoo.decoder())
