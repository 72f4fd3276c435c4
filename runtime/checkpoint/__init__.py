"""Checkpoints of sharded state: saved in the background, proved whole when read, restored onto any mesh."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoints import Checkpoints as Checkpoints
    from .checkpoints import Restored as Restored
    from .differing import Difference as Difference
    from .differing import differing_keys as differing_keys
    from .errors import CheckpointError as CheckpointError
    from .fingerprint import fingerprints as fingerprints
    from .inspection import CheckpointRecord as CheckpointRecord
    from .inspection import list_checkpoints as list_checkpoints
    from .inspection import verify_checkpoint as verify_checkpoint

# Name → module that defines it. Loaded on first use, so that the command line starts without JAX and Orbax.
_HOMES = {
    "CheckpointError": "errors",
    "CheckpointRecord": "inspection",
    "Checkpoints": "checkpoints",
    "Difference": "differing",
    "Restored": "checkpoints",
    "differing_keys": "differing",
    "fingerprints": "fingerprint",
    "list_checkpoints": "inspection",
    "verify_checkpoint": "inspection",
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
