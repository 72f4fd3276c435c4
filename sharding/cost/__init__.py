"""What a way of running a program would cost: seconds and bytes, itemised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import door

if TYPE_CHECKING:
    from ..plans.estimate import Estimate as Estimate
    from .calibration import Calibration as Calibration
    from .candidate import Candidate as Candidate
    from .estimate import Pricer as Pricer
    from .execution import Execution as Execution

# Name → module that defines it.
_HOMES = {
    "Calibration": "calibration",
    "Candidate": "candidate",
    "Estimate": ".plans.estimate",
    "Execution": "execution",
    "Pricer": "estimate",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
