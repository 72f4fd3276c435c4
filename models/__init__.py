"""Reference models: plain functions of parameters and batch, with Flax NNX modules behind them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import Model as Model
    from .perceptron import mlp as mlp
    from .sampling import generate as generate
    from .transformer.config import DecoderConfig as DecoderConfig
    from .transformer.config import preset as preset
    from .transformer.config import preset_facts as preset_facts
    from .transformer.config import presets as presets
    from .transformer.decoder import decoder as decoder

# Name → module that defines it. Loaded on first use: Flax is imported only when a model is built.
_HOMES = {
    "DecoderConfig": "transformer.config",
    "Model": "model",
    "decoder": "transformer.decoder",
    "generate": "sampling",
    "mlp": "perceptron",
    "preset": "transformer.config",
    "preset_facts": "transformer.config",
    "presets": "transformer.config",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)
