"""A model as others write them, through stages; `benchmarks/pipelines.py models` tries five."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import pipeline_models

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

# In Python loops and in scans, of which one goes by turns, in two chunks a stage. `test_stacks.py` has two
# stacks in Python loops, `test_together.py` a loop in two; `benchmarks/pipelines.py models` tries all ways.
CASES = [
    ("nnx_decoder", False, 1),
    ("closures_vision", True, 2),
    ("encoder_decoder", True, 1),
    ("mixture", False, 1),
    ("linen_packed", False, 1),
]


def test_each_model_is_tried() -> None:
    assert [name for name, *_ in CASES] == list(pipeline_models.MODELS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scanned", "interleave"), CASES)
def test_stages_keep_a_models_values_and_gradients(name: str, scanned: bool, interleave: int) -> None:
    mesh = {"stage": 2, "fsdp": 2, "tensor": 2}
    value, gradient = pipeline_models.errors_of(name, scanned, mesh, microbatches=4, interleave=interleave)
    assert value < 1e-6
    assert gradient < 1e-5
