"""The rounds that a mixture's exchanges take, counted as a loss runs forward once with its plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from ..ops.rounds import noted_rounds
from ..plans import arrays
from ..plans.record import Record
from .compose import PlannedLoss
from .meshes import automatic, of_plan
from .said import OF_LOSS, check_given


def count_rounds(
    plan: Record, loss: Callable[..., Any], params: Any, batch: Any, *state: Any, mesh: Mesh
) -> dict[int, int]:
    """Return rounds → exchanges that take so many, see `Plan.count_rounds`."""
    check_given((params, batch, *state), OF_LOSS)
    arrays.check(plan, params, batch, state=state[0] if state else None)
    mesh = of_plan(plan, mesh)
    planned = PlannedLoss(plan, loss, mesh)

    def value(*args: Any) -> Any:
        with automatic(mesh):
            return planned.value(*args)

    with noted_rounds() as found:
        jax.block_until_ready(jax.jit(value)(params, batch, *state))
        jax.effects_barrier()
    own = len(mesh.local_devices)
    return {rounds: count // own for rounds, count in sorted(Counter(found).items())}
