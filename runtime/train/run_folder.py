"""The folder of a run: what is in it, whose it is, and whether a config may go on with it."""

from __future__ import annotations

import pathlib
from typing import Any

import yaml

from ...sharding.errors import UserError, one_line
from ...sharding.files import FolderInUse, FolderLock, write_whole
from ..config import Config, dump

# Settings that do not change what a step computes, so that a run may go on with others: sections and keys.
# The layout is among them, since a checkpoint restores onto any mesh, and so are kernels, since that mesh may
# be of another chip.
_FREE = frozenset(
    {
        "name",
        "run",
        "topology",
        "plan",
        "mesh",
        "rules",
        "remat",
        "microbatches",
        "schedule",
        "interleave",
        "stage_remat",
        "attention",
        "context",
        "experts",
        "calibration",
        "model.reduced",
        "compilation_cache",
        "checkpoint",
        "profile",
        "metrics",
        "hosts",
        "data.prefetch",
        "data.read_threads",
        "data.cache",
        "data.segments",
        "train.steps",
        "train.evaluate_every",
        "train.evaluate_batches",
        "train.sample",
        "train.sample_tokens",
        "train.sample_temperature",
        "train.stop_on_nan",
        "train.check_accumulation",
        "train.step_timeout_seconds",
    }
)


class RunFolder:
    """Paths in a run's folder, and the lock that keeps a second run out of it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.plan = path / "plan.json"
        self.prediction = path / "prediction.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.profile = path / "profile"
        self.tensorboard = path / "tensorboard"
        self._lock: FolderLock | None = None

    def check(self, config: Config) -> None:
        """Raise UserError, naming the settings that differ, if the folder belongs to another config.

        A folder that holds no step yet belongs to nobody.
        """
        if not self.config.exists() or not self._has_steps():
            return
        try:
            before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{self.config} cannot be read: {one_line(error)}") from None
        if not isinstance(before, dict):
            raise UserError(
                f"{self.config} holds no settings, so whose run this is cannot be told; put the run's config "
                "back, or give this run a folder of its own with run=FOLDER"
            )
        now, defaults = (one.model_dump(mode="json") for one in (config, Config()))
        differing = differing_settings(before, now, defaults)
        if differing:
            listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items())
            raise UserError(
                f"{self.path} holds a run with another config ({listed}); go on with that config, "
                "or give this run a folder of its own with run=FOLDER"
            )

    def open(self, config: Config, plan: Any) -> None:
        """Create the folder, lock it against other runs, and write `config.yaml` and `plan.json`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"the run folder {self.path} cannot be made: a file is in the way") from None
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be made: {error.strerror}") from None
        try:
            self._lock = FolderLock(self.path)
        except FolderInUse:
            raise UserError(
                f"another process is training in {self.path}; stop it or give run=FOLDER"
            ) from None
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be locked: {error.strerror}") from None
        write_whole(self.config, dump(config))
        plan.save(self.plan)

    def close(self) -> None:
        """Let other runs in."""
        if self._lock is not None:
            self._lock.release()

    def _has_steps(self) -> bool:
        written = self.metrics.exists() and self.metrics.stat().st_size > 0
        return written or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))


def differing_settings(
    before: Any, now: Any, defaults: Any = None, prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Return dotted key → (before, now) for the settings that must not change within a run and did.

    A setting that `before` lacks, since the run was begun before there was one, has its value of `defaults`.
    """
    differing: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*(before or {}), *now]):
        dotted, default = f"{prefix}{key}", (defaults or {}).get(key)
        old, new = (before or {}).get(key, default), now.get(key)
        if dotted in _FREE or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            differing |= differing_settings(old, new, default, f"{dotted}.")
        else:
            differing[dotted] = (old, new)
    return differing
