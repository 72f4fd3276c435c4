"""Words that a plan may hold: of rematerialisation, kept values, accumulation, stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
ONE_BY_ONE, DELAYED, GPIPE = "1f1b", "delayed", "gpipe"
SCHEDULES = (ONE_BY_ONE, DELAYED, GPIPE)
# What is said of how stages work, by its name.
OF_STAGES = ("schedule", "interleave", "stage_remat")
_IN_WORDS = {DELAYED: "1f1b with weights' gradients delayed"}


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


def stages_in_words(schedule: str, chunks: int, again: bool) -> str:
    """Write how stages work: their schedule, their chunks, and whether they run these `again`.

    >>> stages_in_words("delayed", 4, False)
    "1f1b with weights' gradients delayed of 4 chunks a stage, kept over ticks"
    """
    words = _IN_WORDS.get(schedule, schedule)
    words += f" of {chunks} chunks a stage" if chunks > 1 else ""
    return words if again else f"{words}, kept over ticks"


def of_stages(name: str, written: str) -> Any:
    """Return the value of what `name`, of `OF_STAGES`, is asked about. Raises UserError if it is none.

    >>> of_stages("interleave", "4"), of_stages("stage_remat", "false")
    (4, False)
    """
    if name == "schedule":
        check_word(name, written, SCHEDULES)
        return written
    if name == "interleave":
        if not written.isdigit() or int(written) < 1:
            raise UserError(f"interleave={written} is no number of chunks; write for example interleave=2")
        return int(written)
    if written.lower() not in ("true", "false"):
        raise UserError(f"stage_remat={written} must be true or false")
    return written.lower() == "true"
