"""A model as others write them, through stages; `benchmarks/pipelines.py models` tries five."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pipeline_models

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

FEW = {"mesh": {"stage": 2, "data": 2}, "microbatches": 4}
MANY = {"mesh": {"stage": 2, "fsdp": 2, "tensor": 2}, "microbatches": 4}


@pytest.mark.parametrize(
    ("name", "scanned", "how"),
    [
        pytest.param("mixture", False, FEW, marks=pytest.mark.slow),
        # In a loop and, in two chunks a stage, scanned by turns. `test_together.py` has a loop in two.
        *(
            pytest.param(name, scanned, MANY | {"interleave": 1 + scanned}, marks=pytest.mark.slow)
            for name, scanned in zip(pipeline_models.MODELS, itertools.cycle((False, True)))
        ),
    ],
    ids=str,
)
def test_stages_keep_a_models_values_and_gradients(name: str, scanned: bool, how: dict) -> None:
    value, gradient = pipeline_models.errors_of(name, scanned, **how)
    assert value < 1e-6
    assert gradient < 1e-5
