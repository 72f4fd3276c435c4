"""A few random programs under microbatches; `benchmarks/accumulation.py --random` tries thousands."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import accumulation

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]


def test_random_programs_are_the_whole_batch_or_refused() -> None:
    why = Counter[str]()
    with jax.enable_x64(True):
        found = Counter(outcome for outcome, _ in accumulation.tried(300, 24, 0, why))
    assert set(found) == {"exact", "refused"}
    assert found["exact"] >= 10
    assert found["refused"] == why.total()
