"""A run's checkpoints, checked for the command line and notebooks; changes nothing in the folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from . import manifest
from .reading import verify_arrays
from .records import CheckpointRecord, committed, described


def list_checkpoints(directory: str | Path, *, verify: bool = False) -> list[CheckpointRecord]:
    """Describe the checkpoints in a run's folder (or in its ``checkpoints``), oldest first.

    Checks manifests and files; with `verify` also reads every array and checks its fingerprint. May be
    called while the run is going on.
    """
    return [(verify_checkpoint if verify else described)(path) for path in committed(directory)]


def verify_checkpoint(path: str | Path) -> CheckpointRecord:
    """Read every array of one checkpoint on this process's first device and check its fingerprint."""
    record = described(Path(path).absolute())
    if record.fault is not None:
        return record
    return replace(record, fault=verify_arrays(record.path, manifest.read(record.path)))
