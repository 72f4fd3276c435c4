"""Every `>>>` example in a docstring runs and prints what it shows."""

import doctest
import importlib
import pathlib

import pytest

pytestmark = pytest.mark.numerics

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for package in ("sharding", "models", "runtime")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.devices(8)
@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples_of(file):
    name = ".".join(("meshwright", *file.with_suffix("").parts)).removesuffix(".__init__")
    assert not doctest.testmod(importlib.import_module(name)).failed
