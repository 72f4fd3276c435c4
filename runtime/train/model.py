"""The model that a config names: a preset, or what a function of the user's returns."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ...models import Model, decoder, preset
from ...sharding.errors import UserError, nearest
from ..config import ModelConfig


def build_model(config: ModelConfig) -> Model:
    """Return the model that a config names. Raises UserError if there is none such."""
    if config.build is not None:
        return _users_model(config.build, config.arguments)
    assert config.preset is not None
    return decoder(preset(config.preset, **config.overrides))


def _users_model(where: str, arguments: dict[str, Any]) -> Model:
    module_name, _, function_name = where.partition(":")
    # Where `python -m` looks too; an installed command looks only beside itself and in the libraries.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"model.build={where!r}: {error}{_places(error)}") from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        near = nearest(function_name, dir(module))
        raise UserError(f"model.build: {module_name} has no function {function_name!r}; {near}")
    try:
        model = function(**arguments)
    except TypeError as error:
        raise UserError(
            f"model.build={where!r} with arguments {arguments}: {error}{_places(error)}"
        ) from error
    if not isinstance(model, Model):
        raise UserError(
            f"model.build={where!r} returned {type(model).__name__}, not a meshwright.models.Model"
        )
    return model


def _places(error: BaseException) -> str:
    """Return, in brackets, the user's line that an error passed and the line where it began, if another."""
    ours = (__file__, importlib.__file__)
    passed = [frame for frame in _frames(error) if frame.filename not in ours]
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [f"{frame.filename}:{frame.lineno}" for frame in (*passed[:1], *_frames(root)[-1:])]
    return f" ({', '.join(dict.fromkeys(lines))})" if passed else ""


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if not frame.filename.startswith("<frozen")]
