"""What a way of running a program would cost: seconds and bytes, itemised."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..plans.estimate import Estimate as Estimate
    from .calibration import Calibration as Calibration
    from .candidate import Candidate as Candidate
    from .estimate import Pricer as Pricer

# Name → module that defines it.
_HOMES = {
    "Calibration": "calibration",
    "Candidate": "candidate",
    "Estimate": ".plans.estimate",
    "Pricer": "estimate",
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
