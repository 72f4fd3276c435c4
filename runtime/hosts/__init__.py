"""Processes that form one run: how they find and greet one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...sharding.errors import door

if TYPE_CHECKING:
    from .distributed import Hosts as Hosts
    from .distributed import initialize as initialize
    from .simulated import simulate as simulate

# Name → module that defines it, loaded on first use.
_HOMES = {
    "Hosts": "distributed",
    "initialize": "distributed",
    "simulate": "simulated",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
