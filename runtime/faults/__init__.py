"""Ending a run well: on request at a step that all processes agree on, or at once when one of them fails.

with fail_fast(), StopSignal() as stop, StepWatchdog(config.train.step_timeout_seconds) as watchdog:
    for step in range(first, last):
        watchdog.beat(step)
        …
        if stop.at(step):
            break
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...sharding.errors import door

if TYPE_CHECKING:
    from .failure import fail_fast as fail_fast
    from .failure import is_lost_peer as is_lost_peer
    from .stop import StopSignal as StopSignal
    from .watchdog import StepWatchdog as StepWatchdog

# Name → module that defines it, loaded on first use.
_HOMES = {
    "StepWatchdog": "watchdog",
    "StopSignal": "stop",
    "fail_fast": "failure",
    "is_lost_peer": "failure",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
