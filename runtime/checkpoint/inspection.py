"""A run's checkpoints as records, for the command line and notebooks; changes nothing in the folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import folder, manifest
from .errors import Damaged


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """One checkpoint: `fault` is None when nothing was found wrong, else a sentence naming leaf or file."""

    step: int
    path: Path
    size_bytes: int
    saved_at: str
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    leaves: int
    fault: str | None

    @property
    def good(self) -> bool:
        """Whether nothing was found wrong by the check that made this record."""
        return self.fault is None


def list_checkpoints(directory: str | Path, *, verify: bool = False) -> list[CheckpointRecord]:
    """Describe the checkpoints in a run's folder (or in its ``checkpoints``), oldest first.

    Checks manifests and files; with `verify` also reads every array and checks its fingerprint. May be
    called while the run is going on.
    """
    directory = Path(directory).absolute()
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    check = verify_checkpoint if verify else _checked_files
    return [check(directory / str(step)) for step in folder.committed_steps(directory)]


def verify_checkpoint(path: str | Path) -> CheckpointRecord:
    """Read every array of one checkpoint on this process's first device and check its fingerprint."""
    from .reading import verify_arrays

    described = _checked_files(Path(path).absolute())
    if described.fault is not None:
        return described
    return replace(described, fault=verify_arrays(described.path, manifest.read(described.path)))


def _checked_files(path: Path) -> CheckpointRecord:
    try:
        record = manifest.read(path)
    except Damaged as damage:
        return _described(path, None, str(damage))
    try:
        manifest.check_files(path, record)
    except Damaged as damage:
        return _described(path, record, str(damage))
    return _described(path, record, None)


def _described(path: Path, record: manifest.Manifest | None, fault: str | None) -> CheckpointRecord:
    return CheckpointRecord(
        step=int(path.name) if record is None else record.step,
        path=path,
        size_bytes=sum(file.size_bytes for file in manifest.files_of(path)),
        saved_at="" if record is None else record.saved_at,
        metrics={} if record is None else record.metrics,
        metadata={} if record is None else record.metadata,
        leaves=0 if record is None else len(record.leaves),
        fault=fault,
    )
