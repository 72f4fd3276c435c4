"""Published shapes by name, from `models/presets.toml`."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

from ...sharding.errors import UserError, nearest
from .config import DecoderConfig, checked_fields

# Facts about a preset that are not fields of the config.
_FACTS = ("source", "parameters", "learning_rate")


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads((Path(__file__).parents[1] / "presets.toml").read_text("utf-8"))


def presets() -> list[str]:
    """Return the names that `preset` knows."""
    return list(_table())


def preset_facts(name: str) -> dict[str, Any]:
    """Return what is known of a preset beyond its config: `source`, published `parameters`, `learning_rate`.

    Raises `UserError` for an unknown name.
    """
    return {key: value for key, value in _row(name).items() if key in _FACTS}


def preset(name: str, **overrides: Any) -> DecoderConfig:
    """Return the config of a published model, with any field replaced.

    Raises `UserError` for an unknown name or field, naming the nearest, and for fields that do not fit.

    >>> preset("llama3-8b", layers=2).layers
    2
    """
    checked_fields(overrides)
    row = {key: value for key, value in _row(name).items() if key not in _FACTS}
    return DecoderConfig(**(row | overrides))


def _row(name: str) -> dict[str, Any]:
    table = _table()
    if name not in table:
        raise UserError(f"there is no preset {name!r}; {nearest(name, table)}")
    return table[name]
