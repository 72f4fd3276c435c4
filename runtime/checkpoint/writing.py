"""The second half of a save: from Orbax's files to a committed checkpoint."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from . import folder, manifest
from .fingerprint import Fingerprints
from .manifest import Manifest, SavedArray


def finish(
    directory: Path,
    step: int,
    response: Any,
    started: Fingerprints,
    described: Sequence[tuple[str, tuple[int, ...], str]],
    metadata: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> None:
    """Wait for the arrays to be written, add the manifest and commit.

    `described` gives name, shape and dtype of each leaf. What was written is removed if anything fails, so
    that a full disk is not left full.
    """
    writing = folder.writing_path(directory, step)
    try:
        response.result()
        prints = started.hex()
        if jax.process_index() != 0:
            return
        leaves = tuple(
            SavedArray(name=name, shape=shape, dtype=dtype, fingerprint=fingerprint)
            for (name, shape, dtype), fingerprint in zip(described, prints, strict=True)
        )
        record = Manifest(
            step=step,
            metadata=metadata,
            metrics=metrics,
            versions=_versions(),
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            leaves=leaves,
            files=manifest.files_of(writing),
        )
        manifest.write(writing, record)
        folder.commit(directory, step)
    except BaseException:
        if jax.process_index() == 0:
            for left in directory.glob(f"{writing.name}*"):
                shutil.rmtree(left, ignore_errors=True)
        raise


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("meshwright", "jax", "orbax-checkpoint"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
