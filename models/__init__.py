"""Reference models: plain functions of parameters and batch, with Flax NNX modules behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sharding.errors import door

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
__getattr__, __dir__ = door(__name__, _HOMES)
