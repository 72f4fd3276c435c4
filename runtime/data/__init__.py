"""Text and token arrays, packed into batches that depend on the seed and the step alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .batches import Data as Data
    from .batches import open_data as open_data
    from .config import DataConfig as DataConfig
    from .corpus import Corpus as Corpus
    from .corpus import open_corpus as open_corpus
    from .prefetch import Prefetch as Prefetch
    from .tokenizer import Tokenizer as Tokenizer
    from .tokenizer import load_tokenizer as load_tokenizer

# Name → module that defines it, loaded on first use: the config of a run is read before jax is.
_HOMES = {
    "Corpus": "corpus",
    "Data": "batches",
    "DataConfig": "config",
    "Prefetch": "prefetch",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "open_corpus": "corpus",
    "open_data": "batches",
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
