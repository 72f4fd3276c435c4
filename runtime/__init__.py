"""Training, data, checkpoints, profiling, hosts and the command line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hosts.distributed import simulate as simulate

# Name → module that defines it, loaded on first use.
_HOMES = {"simulate": "hosts.distributed"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
