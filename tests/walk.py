"""The way of a batch to its loss, file by file: `python tests/walk.py` prints it for the small config.

One step of training is taken as far as its trace, by the loop itself. A file is on the way if a function of
it holds the batch or an array made of it, in an argument or a local variable. Such arrays are told by the
number of rows, which no other dimension has.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any
from unittest.mock import MagicMock

import jax
import numpy as np
from meshwright.runtime.config.config import Config, load
from meshwright.runtime.train.job import build_job
from meshwright.runtime.train.loop import TrainingLoop
from training import write_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS = 40
WORDS = (
    f"train.global_batch={ROWS}",
    "train.steps=1",
    "topology=cpu:8",
    "mesh={data: 2, fsdp: 2, tensor: 2}",
)
_PACKAGES = tuple(f"{ROOT / package}/" for package in ("sharding", "models", "runtime"))
_WATCHED = (*_PACKAGES, __file__)


def walk(config: Config) -> list[str]:
    """Return the files on a batch's way to its loss, in order; the config's batches have `ROWS` rows."""
    job = build_job(config)
    # Planning has traced the loss; it is to be traced again where the step is.
    jax.clear_caches()

    def update(state: Any, batch: Any) -> tuple[Any, Any]:
        job.step.update.lower(state, batch)
        return state, {}

    idle = {name: MagicMock() for name in ("checkpoints", "collector", "window", "stop", "watchdog", "say")}
    loop = TrainingLoop(config=config, job=job, update=update, **idle)
    with _watched() as files:
        loop.run({**job.step.abstract_state, "stopped": np.bool_(False)}, 0)
    return [file.removeprefix(f"{ROOT}/") for file in files]


@contextlib.contextmanager
def _watched() -> Iterator[dict[str, None]]:
    """Gather files of ours whose functions hold arrays with `ROWS` rows, in the order in which they do."""
    files: dict[str, None] = {}

    def look(frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(_WATCHED):
            # The caller first: it holds the batch when it hands it on.
            for one in filter(None, (frame.f_back, frame)):
                path = one.f_code.co_filename
                new = path.startswith(_PACKAGES) and path not in files
                if new and any(_of_batch(value) for value in list(one.f_locals.values())):
                    files[path] = None

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def _of_batch(value: Any, depth: int = 3) -> bool:
    if isinstance(value, jax.Array | np.ndarray):
        return ROWS in value.shape
    if depth and isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return any(_of_batch(one, depth - 1) for one in inner)
    return False


def lines(files: list[str]) -> int:
    """Return the lines of all of them."""
    return sum(len((ROOT / file).read_text("utf-8").splitlines()) for file in files)


def main() -> None:
    """Print the walk."""
    from meshwright.runtime import simulate

    simulate(8)
    with tempfile.TemporaryDirectory() as folder:
        files = walk(load(write_config(pathlib.Path(folder)), [*WORDS]))
    for number, file in enumerate(files, 1):
        print(f"{number:3}. {file}")
    print(f"{len(files)} files, {lines(files):,} lines")


if __name__ == "__main__":
    main()
