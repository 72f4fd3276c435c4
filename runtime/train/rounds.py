"""Watch over how evenly a mixture's router spreads tokens: whether exchanges take more than one round."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ...sharding.ops.experts import SLACK
from ...sharding.plans.record import Decision
from ...sharding.plans.specs import axes_in

LOAD = "expert_load"
# Steps that are looked at together, after the first ones, whose routers are as they were drawn.
_STEPS = 20


def exchange_axes(plan: Decision) -> tuple[str, ...]:
    """Return the mesh axes over which tokens go to their experts and back; none where they stay."""
    rows = {axis for row in plan.batch.values() for axis in axes_in(row.spec)}
    # Nothing else that parameters have is computed over an axis that cuts rows.
    of_parameters = (dim.axes for dim in plan.dims.values() if dim.argument == 0)
    return next((axes for axes in of_parameters if axes and rows.issuperset(axes)), ())


class RoundsWatch:
    """A sink of records that says once when more than one round is taken in most steps.

    The record's `expert_load` is the fullest expert over the mean of its layer; a round has room for `SLACK`
    times the even share.
    """

    def __init__(self, axes: tuple[str, ...], say: Callable[[str], object]) -> None:
        """Watch an exchange over `axes`."""
        self._axes, self._say = axes, say
        self._loads: deque[float] = deque(maxlen=_STEPS)
        self._said = False

    @property
    def said(self) -> bool:
        """Whether it has said so."""
        return self._said

    def write(self, record: Mapping[str, Any]) -> None:
        """Look at one step."""
        if LOAD not in record or self._said:
            return
        self._loads.append(record[LOAD])
        full = sum(load > SLACK for load in self._loads)
        if len(self._loads) < _STEPS or 2 * full <= _STEPS:
            return
        self._said = True
        self._say(
            f"note: in {full} of {_STEPS} steps up to {record['step']} the fullest expert had more than "
            f"{SLACK:g} times its even share (now {LOAD}={record[LOAD]:.2f}): tokens take more than one "
            f"round over {' x '.join(self._axes)} where a device's experts are that full together, which is "
            "counted with the next checkpoint; "
            "model.overrides.balance_loss or router_bias_rate evens them out"
        )

    def close(self) -> None:
        """Nothing is left to say."""
