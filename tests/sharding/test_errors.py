"""Lazy doors: what they load, and what they say of a module that does not load."""

import importlib
import pathlib
import sys
from collections.abc import Iterator

import pytest
from meshwright.sharding import cost

DOOR = """
from meshwright.sharding.errors import door

_HOMES = {"answer": "good", "lost": "good", "dark": "broken", "foreign": "needy", "strict": "refusing"}
__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
"""
MODULES = {
    "__init__": DOOR,
    "good": "answer = 42",
    "broken": "import sys\nsys.no_such_thing",
    "needy": "import a_library_that_is_not_here",
    "refusing": "raise ValueError('not on this machine')",
    "apart": "",
}


@pytest.fixture
def package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a package with a door to modules that load and that do not."""
    name = "package_with_a_door"
    (tmp_path / name).mkdir()
    for module, text in MODULES.items():
        (tmp_path / name / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def test_a_name_is_loaded_on_first_use_and_kept(package: str) -> None:
    module = importlib.import_module(package)
    assert dir(module) == sorted(module._HOMES)
    assert f"{package}.good" not in sys.modules
    assert module.answer == 42
    assert vars(module)["answer"] == 42


def test_a_home_may_stand_beside_the_package() -> None:
    assert cost._HOMES["Estimate"] == ".plans.estimate"
    assert cost.Estimate.__module__ == "meshwright.sharding.plans.estimate"


def test_what_is_not_in_the_table_is_no_attribute(package: str) -> None:
    module = importlib.import_module(package)
    assert not hasattr(module, "question")
    with pytest.raises(ImportError, match="cannot import name 'question'"):
        exec(f"from {package} import question")
    exec(f"from {package} import apart")


@pytest.mark.parametrize(
    ("name", "kind", "cause"),
    [
        ("dark", ImportError, "broken fails with AttributeError.*no_such_thing"),
        ("lost", ImportError, "good fails with AttributeError.*'lost'"),
        ("foreign", ModuleNotFoundError, "No module named 'a_library_that_is_not_here'"),
        ("strict", ValueError, "not on this machine"),
    ],
)
def test_the_cause_is_said_of_a_module_that_fails(
    package: str, name: str, kind: type[Exception], cause: str
) -> None:
    with pytest.raises(kind, match=cause):
        exec(f"from {package} import {name}")
    with pytest.raises(kind, match=cause):
        getattr(importlib.import_module(package), name)
