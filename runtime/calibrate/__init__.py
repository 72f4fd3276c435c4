"""Calibration of the attached devices: what their kernels and links reach, measured and fitted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...sharding.errors import door

if TYPE_CHECKING:
    from .measure import calibrate as calibrate

__all__ = ["calibrate"]
__getattr__, __dir__ = door(__name__, {"calibrate": "measure"})
