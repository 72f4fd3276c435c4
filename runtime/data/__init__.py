"""Text and token arrays, packed into batches that depend on the seed and the step alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...sharding.errors import door

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
__getattr__, __dir__ = door(__name__, _HOMES)
