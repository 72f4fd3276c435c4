"""What users may write: names, arguments, commands, options and settings, as `tests/api.txt` lists them.

`python tests/api.py` adds what is new to the list. It takes nothing away: a name that goes is struck from the
list by hand, and CHANGELOG.md says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import typer.main
from meshwright import models, runtime, sharding
from meshwright.runtime.cli.main import app
from meshwright.runtime.config import Config
from pydantic import BaseModel

LIST = pathlib.Path(__file__).with_name("api.txt")
HEADER = (
    "# One line a name: where it stands, then its arguments, options or fields; `tests/api.py` says more.\n"
)

_INNER = ("meshwright.sharding.cost.", "meshwright.sharding.program.")

# What is listed: a name and the words that it takes.
Api = dict[str, set[str]]


def doors() -> Iterator[ModuleType]:
    """Return every module that lists what it offers."""
    for package in (sharding, models, runtime):
        yield package
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.ispkg or "__all__" in (_source(found.name) or ""):
                module = importlib.import_module(found.name)
                if hasattr(module, "__all__"):
                    yield module


def _source(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return pathlib.Path(spec.origin).read_text("utf-8") if spec and spec.origin else None


def api() -> Api:
    """Return everything that users may write, as it is now."""
    found: Api = {}
    for door in doors():
        for name in door.__all__:
            found |= _described(f"{door.__name__}.{name}", getattr(door, name))
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        words = {word for parameter in command.params for word in (*parameter.opts, parameter.metavar)}
        found[f"$ meshwright {name}"] = {word for word in words if word and word.startswith(("-", "["))}
    return found | {f"config: {section}": fields for section, fields in _settings(Config, "").items()}


def _described(name: str, value: Any) -> Api:
    if inspect.isclass(value):
        # What a Program or a Candidate consists of is the planner's own business.
        return {name: set()} if name.startswith(_INNER) else _class(name, value)
    return {name: set(inspect.signature(value).parameters) if inspect.isfunction(value) else set()}


def _class(name: str, found: type) -> Api:
    """Return a class, its fields and, of what is ours of it, its methods."""
    own = [base for base in found.__mro__ if base.__module__.startswith("meshwright.")]
    public = {key: value for base in own for key, value in vars(base).items() if not key.startswith("_")}
    fields = {key for base in own for key in inspect.get_annotations(base) if not key.startswith("_")}
    methods = {key: getattr(found, key) for key in public if callable(getattr(found, key))}
    values = {key for key in public if key not in methods}
    return {name: (fields | values) - {"model_config"}} | {
        f"{name}.{key}": set(inspect.signature(method).parameters) - {"self"}
        for key, method in methods.items()
        if inspect.isfunction(method) or inspect.ismethod(method)
    }


def _settings(model: type[BaseModel], section: str) -> Api:
    found: Api = {section or "(top)": set(model.model_fields)}
    for name, field in model.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            found |= _settings(field.annotation, f"{section}.{name}".lstrip("."))
    return found


def read() -> Api:
    """Return what the list holds."""
    lines = [line for line in LIST.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    rows = [line.partition(" | ") for line in lines]
    return {name.strip(): set(words.split()) for name, _, words in rows}


def write(listed: Api) -> None:
    """Write a list, a line a name."""
    lines = [f"{name} | {' '.join(sorted(words))}".rstrip(" |") for name, words in sorted(listed.items())]
    LIST.write_text(HEADER + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    before, now = (read() if LIST.exists() else {}), api()
    write({name: before.get(name, set()) | now.get(name, set()) for name in before.keys() | now.keys()})
