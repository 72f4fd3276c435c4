"""A reader who follows a batch to its loss opens few files."""

from __future__ import annotations

import pathlib

import pytest
from meshwright.runtime.config.config import load
from training import write_config
from walk import ROOT, WORDS, walk

# Lower it with every file that goes.
MOST = 12
MAP = ROOT / "docs" / "architecture.md"


@pytest.mark.devices(8)
def test_the_way_of_a_batch_to_its_loss_is_short_and_on_the_map(tmp_path: pathlib.Path) -> None:
    files = walk(load(write_config(tmp_path), [*WORDS]))
    # It starts where a batch is made, goes through the loop and the step, and ends in the model.
    order = [files.index(file) for file in (
        "runtime/data/batches.py",
        "runtime/train/loop.py",
        "sharding/transform/step.py",
        "models/transformer/decoder.py",
        "models/transformer/loss.py",
    )]  # fmt: skip
    assert order == sorted(order)
    assert len(files) <= MOST, f"{files}; `python tests/walk.py` prints the way"
    if MAP.exists():
        text = MAP.read_text("utf-8")
        assert not [file for file in files if file not in text], "docs/architecture.md leaves out a file"
