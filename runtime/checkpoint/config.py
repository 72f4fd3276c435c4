"""Settings of checkpoints."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from ..config.section import Section


class CheckpointConfig(Section):
    """When the state is saved and which saves are kept; the last step is always saved."""

    every: int = Field(default=100, ge=0, description="Steps between saves; 0 saves the last step only.")
    keep_last: int | None = Field(
        default=3, ge=1, description="Newest checkpoints that are kept; null keeps all."
    )
    keep_every: int | None = Field(
        default=None, ge=1, description="Checkpoints whose step is a multiple are kept for good."
    )
    keep_best: str | None = Field(
        default=None,
        description="Metric (`loss` or `eval_loss`) whose best checkpoint is kept besides; null for none.",
    )
    best_mode: Literal["min", "max"] = Field(
        default="min", description="Whether the best value is the smallest or largest."
    )

    @pydantic.model_validator(mode="after")
    def _known_metric(self) -> CheckpointConfig:
        if self.keep_best is not None and self.keep_best not in ("loss", "eval_loss"):
            raise ValueError(
                f"keep_best={self.keep_best!r} is not a metric of a checkpoint; known: loss, eval_loss"
            )
        if self.best_mode != "min" and self.keep_best is None:
            raise ValueError(f"best_mode={self.best_mode!r} has no effect without keep_best; leave it out")
        return self
