"""The names in a folder of checkpoints, and moves that a kill cannot leave half done.

::

    200/           a checkpoint, whole when it was committed: Orbax's files and manifest.json
    300.writing/   being written; left by a run that was killed
    100.deleting/  being deleted; likewise
    damaged/250/   set aside because it is not what was saved
    superseded/…   of a time line that was left by resuming from an older step
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .manifest import sync_directory

_UNFINISHED = (".writing", ".deleting")


def committed_steps(directory: Path) -> list[int]:
    """Return the steps of the checkpoints in `directory`, oldest first; whole or not, they were committed."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def damaged_names(directory: Path) -> list[str]:
    """Return the names of the checkpoints that were set aside as damaged."""
    aside = directory / "damaged"
    return sorted(path.name for path in aside.iterdir()) if aside.is_dir() else []


def writing_path(directory: Path, step: int) -> Path:
    """Return where a checkpoint is put together before `commit`."""
    return directory / f"{step}.writing"


def commit(directory: Path, step: int) -> None:
    """Give a finished checkpoint its name, which is what makes it count."""
    os.rename(writing_path(directory, step), directory / str(step))
    sync_directory(directory)


def delete(directory: Path, step: int) -> None:
    """Delete a checkpoint; if killed midway, it no longer counts and the next run deletes the rest."""
    doomed = directory / f"{step}.deleting"
    os.rename(directory / str(step), doomed)
    shutil.rmtree(doomed)


def set_aside(directory: Path, step: int, kind: str) -> Path:
    """Move a checkpoint to the folder `kind` ("damaged" or "superseded") and return where it is now."""
    aside = directory / kind
    aside.mkdir(exist_ok=True)
    target, tries = aside / str(step), 1
    while target.exists():
        tries += 1
        target = aside / f"{step}-{tries}"
    os.rename(directory / str(step), target)
    sync_directory(directory)
    return target


def remove_unfinished(directory: Path) -> list[str]:
    """Remove what a killed run left half written or half deleted; returns the names."""
    found = [
        path
        for path in sorted(directory.iterdir())
        if path.name.split(".")[0].isdecimal() and any(mark in path.name for mark in _UNFINISHED)
    ]
    for path in found:
        shutil.rmtree(path)
    return [path.name for path in found]
