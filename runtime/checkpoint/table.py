"""A run's checkpoints as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .inspection import CheckpointRecord


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
