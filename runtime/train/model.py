"""The model that a config names: a preset, or what a function of the user's returns."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ...models import Model, decoder, preset
from ...sharding.errors import UserError, nearest, one_line
from ...sharding.hlo.frames import is_library
from ...sharding.words import first_of
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
    module = _module(where, module_name)
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        near = nearest(function_name, _functions(module))
        kind = "" if function is None else f" is of type {type(function).__name__}, no function;"
        said = f"{where!r}{kind}" if kind else f"{module_name} has no function {function_name!r};"
        raise UserError(f"model.build: {said} {near}")
    _check_arguments(where, function, arguments)
    try:
        model = function(**arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"model.build={where!r} fails: {_said(error)}{_places(error)}") from error
    if not isinstance(model, Model):
        raise UserError(
            f"model.build={where!r} returned {type(model).__name__}, not a meshwright.models.Model"
        )
    return dataclasses.replace(
        model,
        init=_telling(model.init, "the model's init"),
        loss=_telling(model.loss, "the loss"),
        logits=_telling(model.logits, "the model's logits"),
    )


def _check_arguments(where: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return  # A built-in may not say what it takes.
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = [name for name, one in known.items() if one.kind in by_name]
    any_name = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    name = where.partition(":")[2]
    for given in arguments if not any_name else ():
        if given not in takes:
            raise UserError(f"model.arguments: {name} ({where}) takes no {given!r}; {nearest(given, takes)}")
    missing = [one for one in takes if known[one].default is inspect.Parameter.empty and one not in arguments]
    if missing:
        raise UserError(f"model.arguments: {name} ({where}) is given nothing for {first_of(missing)}")


def _module(where: str, name: str) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        meant = ".".join(part for part in name.removesuffix(".py").split("/") if part.isidentifier())
        instead = f"write {meant}:{where.partition(':')[2]}" if meant else "write module:function"
        raise UserError(f"model.build={where!r}: {name!r} is no name of a module; {instead}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise UserError(f"model.build={where!r}: {error}{_places(error)}") from error
        raise UserError(
            f"model.build={where!r}: there is no module {error.name} in {os.getcwd()}, where this runs, "
            "nor among what is installed"
        ) from error
    except ImportError as error:
        raise UserError(f"model.build={where!r}: {error}{_places(error)}") from error
    except (Exception, SystemExit) as error:
        raise UserError(
            f"model.build={where!r} cannot be imported: {_said(error)}{_places(error)}"
        ) from error


def _functions(module: Any) -> list[str]:
    """Return the functions that a module defines itself, those that it has from elsewhere if none."""
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    own = [name for name in names if getattr(vars(module)[name], "__module__", None) == module.__name__]
    return own or names


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__


def _telling(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return `function`, of whose own errors a sentence with its line is told; what JAX raises passes."""

    @functools.wraps(function)
    def told(*args: Any) -> Any:
        try:
            return function(*args)
        except UserError:
            raise
        except Exception as error:
            last = _frames(error)[-1]
            if is_library(last.filename):
                raise
            raise UserError(f"{what} fails: {_said(error)}{_places(error)}") from error

    return told


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
