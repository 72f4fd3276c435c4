"""A run's checkpoints as records, read without JAX from their manifests and the sizes of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


def committed(directory: str | Path) -> list[Path]:
    """Return the checkpoints in a run's folder (or in its ``checkpoints``), oldest first."""
    directory = Path(directory).absolute()
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    return [directory / str(step) for step in folder.committed_steps(directory)]


def described(path: Path) -> CheckpointRecord:
    """Describe one checkpoint by its manifest and its files; nothing is read of its arrays."""
    record = fault = None
    try:
        record = manifest.read(path)
        manifest.check_files(path, record)
    except Damaged as damage:
        fault = str(damage)
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


def table(records: Sequence[CheckpointRecord], *, verified: bool) -> Any:
    """Return a rich table: each checkpoint's step, size, time, metrics, and what is wrong with it."""
    from rich.table import Table

    grid = Table("step", "size", "saved at", "metrics", "fingerprints" if verified else "files", box=None)
    for record in records:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
        state = record.fault or ("all match" if verified else "all there")
        grid.add_row(
            str(record.step), f"{record.size_bytes / 2**20:.1f} MiB", record.saved_at, metrics, state
        )
    return grid


def plain(record: CheckpointRecord) -> dict[str, Any]:
    """Return a record as plain values, for JSON."""
    return {
        "step": record.step,
        "path": str(record.path),
        "size_bytes": record.size_bytes,
        "saved_at": record.saved_at,
        "metrics": dict(record.metrics),
        "leaves": record.leaves,
        "fault": record.fault,
    }
