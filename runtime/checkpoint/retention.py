"""Which checkpoints a run keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ...sharding.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What is kept: the newest `keep_last` (None: all), multiples of `keep_every` steps, and the best one.

    `keep_best` names a metric given to `save`; the checkpoint where it was lowest (`best_mode="min"`) or
    highest (`"max"`) stays. The newest checkpoint stays whatever the settings say.
    """

    keep_last: int | None = 3
    keep_every: int | None = None
    keep_best: str | None = None
    best_mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} keeps nothing; write 1 or more, or null")
        if self.best_mode not in ("min", "max"):
            raise UserError(f"best_mode={self.best_mode!r} is unknown; write 'min' or 'max'")


def expendable(rules: Retention, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
    """Return the steps that may be deleted, oldest first.

    `metrics` maps the step of every good checkpoint to the metrics saved with it (may be empty).
    """
    steps = sorted(metrics)
    if not steps or rules.keep_last is None:
        return []
    kept = {*steps[-rules.keep_last :], steps[-1]}
    if rules.keep_every is not None:
        kept |= {step for step in steps if step % rules.keep_every == 0}
    if rules.keep_best is not None:
        kept |= _best(rules.keep_best, rules.best_mode, metrics)
    return [step for step in steps if step not in kept]


def _best(metric: str, mode: str, metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
    sign = 1.0 if mode == "min" else -1.0
    known = {
        step: sign * values[metric]
        for step, values in metrics.items()
        if metric in values and not math.isnan(values[metric])
    }
    # Of two equally good ones the newer is kept.
    return {min(known, key=lambda step: (known[step], -step))} if known else set()
