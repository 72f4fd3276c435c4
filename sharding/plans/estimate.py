"""Predicted seconds and bytes of a plan, itemised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a candidate is predicted to cost.

    mfu is the share of the chip's peak that the program's own flops, forward and backward without
    recomputation, come to. The items of `time` (seconds) and `memory` (bytes) add up to `step_seconds` and
    `peak_bytes`. `heap_bytes` is what arrays of that peak are laid out in, with the places between them that
    stay free; None where there are none.
    """

    step_seconds: float
    mfu: float
    peak_bytes: float
    time: Mapping[str, float]
    memory: Mapping[str, float]
    heap_bytes: float | None = None

    @property
    def needed_bytes(self) -> float:
        """Bytes that a device must offer."""
        return self.peak_bytes if self.heap_bytes is None else self.heap_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as plain values."""
        return {
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
            "peak_bytes": self.peak_bytes,
            "time": dict(self.time),
            "memory": dict(self.memory),
            "heap_bytes": self.heap_bytes,
        }
