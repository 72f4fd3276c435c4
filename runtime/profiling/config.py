"""What a user may say about profiling."""

from __future__ import annotations

from pydantic import Field, field_validator

from ..config.section import Section

#: A trace grows by thousands of events a step on every device: more steps make files that no viewer opens.
MAX_STEPS = 20


class ProfileConfig(Section):
    """Which steps of training to capture as an XLA trace in the run's ``profile/`` folder."""

    start_step: int | None = Field(
        default=None,
        ge=0,
        description="First step of the captured window; null captures nothing. Take a step well after the "
        "first, which compiles.",
    )
    num_steps: int = Field(
        default=3,
        ge=1,
        description=f"Steps in the window, 1 to {MAX_STEPS}: a few steps say as much as many.",
    )

    @field_validator("num_steps")
    @classmethod
    def _keep_the_window_small(cls, value: int) -> int:
        if value > MAX_STEPS:
            raise ValueError(
                f"num_steps={value} is too long a window: a trace holds every operation of every device, and "
                f"past {MAX_STEPS} steps it fills memory and no viewer opens it; nearest: {MAX_STEPS}"
            )
        return value
