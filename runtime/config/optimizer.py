"""Settings of the optimiser."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from .section import Section


class OptimizerConfig(Section):
    """Which optimiser, how fast, and how its gradients are kept in bounds."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = Field(default="adamw", description="Optimiser.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "cosine", "linear", "wsd"] = Field(
        default="cosine",
        description="Course of the learning rate after warm-up; `wsd` stays, then falls at the end.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps over which the learning rate rises from 0 to its peak."
    )
    decay_steps: int | None = Field(
        default=None, ge=1, description="Steps of `wsd`'s final fall; null takes a fifth of the run."
    )
    final_fraction: float = Field(
        default=0.1, ge=0, le=1, description="Last learning rate as a fraction of the peak."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled decay of matrices; vectors such as norms get none."
    )
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="Largest global norm of the gradients; null for no bound."
    )
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="Decay of the first moment (adamw, lion) or momentum (muon)."
    )
    beta2: float = Field(
        default=0.95,
        ge=0,
        lt=1,
        description="Decay of the second moment (adamw, muon's vectors) or second rate (lion).",
    )
    epsilon: float = Field(
        default=1e-8, gt=0, description="Added to the root of the second moment (adamw, muon)."
    )
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of the stored first moment."
    )

    @pydantic.model_validator(mode="after")
    def _only_what_counts(self) -> OptimizerConfig:
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(f"decay_steps={self.decay_steps} is for schedule='wsd', not {self.schedule!r}")
        if self.schedule == "constant":
            self._refuse_dead(("final_fraction",), "schedule='constant', whose rate never falls")
        if self.name == "adafactor":
            dead = ("beta1", "beta2", "epsilon", "moment_dtype")
            self._refuse_dead(dead, "name='adafactor', which sets its own decay and keeps no first moment")
        if self.name == "lion":
            self._refuse_dead(("epsilon",), "name='lion', which divides by nothing")
        return self

    def _refuse_dead(self, fields: tuple[str, ...], choice: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if value != type(self).model_fields[field].default:
                raise ValueError(f"{field}={value!r} has no effect with {choice}; leave it out")
