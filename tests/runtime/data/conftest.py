"""A small corpus of real files, and a cache that each test has to itself."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from meshwright.runtime.data import DataConfig


@pytest.fixture
def config(tmp_path: pathlib.Path):
    """Make a DataConfig whose cache is the test's own."""

    def make(source: pathlib.Path | str, **changes: Any) -> DataConfig:
        return DataConfig(
            **{"source": str(source), "cache": str(tmp_path / "cache"), "sequence": 16, **changes}
        )

    return make


@pytest.fixture
def texts(tmp_path: pathlib.Path) -> pathlib.Path:
    """Make a folder of 40 text files of different lengths."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"file {number} says " + "abcdefg " * (number + 1))
    return folder


@pytest.fixture
def told() -> list[str]:
    """List for what `report=told.append` is told."""
    return []
