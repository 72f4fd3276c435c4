"""Words that a plan may hold: of rematerialisation, kept values, accumulation, stages."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UserError, check_word, nearest
from ..hardware.axes import AXES

# What layers keep for their backward pass; `transform.remat` maps each to JAX's policy.
REMATS = ("none", "dots", "full")
# The policy of keeping the values that a plan names, and where each may be kept.
NAMES = "names"
PLACES = ("device", "host")

# How the gradients of microbatches go together: to those of the whole batch, or to the mean of the parts'.
EXACT, BY_PART = "exact", "by part"
ACCUMULATIONS = (EXACT, BY_PART)

# Orders in which pipeline stages work: one forward, one backward; that with the gradients of layers' weights
# later than those which stages wait for; or all forward, then all backward.
ONE_BY_ONE, DELAYED = "1f1b", "delayed"
SCHEDULES = (ONE_BY_ONE, DELAYED, "gpipe")


def check_words(mesh: Iterable[str], remat: str, schedule: str | None) -> None:
    """Raise UserError, naming the nearest, for a mesh axis, a policy or a schedule that is not known."""
    if remat not in (*REMATS, NAMES):
        raise UserError(f"remat={remat!r} is not a policy; {nearest(remat, (*REMATS, NAMES))}")
    if schedule is not None and schedule not in SCHEDULES:
        raise UserError(f"schedule={schedule!r} is unknown; {nearest(schedule, SCHEDULES)}")
    for axis in mesh:
        if axis not in AXES:
            raise UserError(f"mesh axis {axis!r} is not known; {nearest(axis, AXES)}")


def check_accumulation(accumulation: str) -> str:
    """Return the word. Raises UserError, naming the nearest, if it is none."""
    check_word("accumulation", accumulation, ACCUMULATIONS)
    return accumulation
