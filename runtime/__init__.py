"""Training, data, checkpoints, profiling, hosts and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sharding.errors import door

if TYPE_CHECKING:
    from .hosts.simulated import simulate as simulate

# Name → module that defines it, loaded on first use.
_HOMES = {"simulate": "hosts.simulated"}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
