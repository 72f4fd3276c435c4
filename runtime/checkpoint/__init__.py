"""Checkpoints of sharded state: saved in the background, proved whole when read, restored onto any mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...sharding.errors import door

if TYPE_CHECKING:
    from .checkpoints import Checkpoints as Checkpoints
    from .checkpoints import Restored as Restored
    from .errors import CheckpointError as CheckpointError
    from .fingerprint import fingerprints as fingerprints
    from .inspection import list_checkpoints as list_checkpoints
    from .inspection import verify_checkpoint as verify_checkpoint
    from .records import CheckpointRecord as CheckpointRecord

# Name → module that defines it. Loaded on first use, so that the command line starts without JAX and Orbax.
_HOMES = {
    "CheckpointError": "errors",
    "CheckpointRecord": "records",
    "Checkpoints": "checkpoints",
    "Restored": "checkpoints",
    "fingerprints": "fingerprint",
    "list_checkpoints": "inspection",
    "verify_checkpoint": "inspection",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
