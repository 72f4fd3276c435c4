"""Files that say which processes are capturing a window, so that the next run knows if one died in it.

A profiler can take its process with it: on NVIDIA GPUs CUPTI may leave the device's context unusable, and the
steps after the window end in an illegal address. The window of a process that did not come out of it is not
captured again.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...sharding.files import write_whole

_PREFIX = "capturing_"


def mark(directory: Path, process: int, window: tuple[int, int]) -> None:
    """Say that `process` is about to capture `window`, (first step, steps); the file appears whole."""
    directory.mkdir(parents=True, exist_ok=True)
    record = {"start_step": window[0], "num_steps": window[1], "process": process}
    write_whole(_path(directory, process), json.dumps(record) + "\n")


def unmark(directory: Path, process: int) -> None:
    """Say that `process` has come out of its window."""
    _path(directory, process).unlink(missing_ok=True)


def died_in(directory: Path, window: tuple[int, int]) -> Path | None:
    """Return the file of a process that did not come out of `window`; None where none is known."""
    for path in sorted(directory.glob(f"{_PREFIX}*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if (record["start_step"], record["num_steps"]) == window:
                return path
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def any_left(directory: Path) -> Path | None:
    """Return a file of a process that is in a window, or died in one; None where there is none."""
    return next(iter(sorted(directory.glob(f"{_PREFIX}*.json"))), None)


def _path(directory: Path, process: int) -> Path:
    return directory / f"{_PREFIX}{process}.json"
