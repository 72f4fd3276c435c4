"""Starting the processes of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...sharding.errors import door

if TYPE_CHECKING:
    from .local import launch as launch
    from .local import launch_training as launch_training

# Name → module that defines it, loaded on first use.
_HOMES = {"launch": "local", "launch_training": "local"}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
