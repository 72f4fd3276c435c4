"""A pipeline's seconds by what its stages do, and what they wait, measured beside predicted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ...sharding.cost.pipeline import lockstep
from ...sharding.plans.record import Record
from ...sharding.transform.pipeline.schedule import work_of
from .profile import Operation, PipelineTime


def pipeline_time(operations: Iterable[Operation], plan: Record) -> PipelineTime | None:
    """Return where a pipeline's time went by the scopes of `operations`; None where none is of a pipeline."""
    stages = plan.mesh.get("stage", 1)
    seconds: dict[str, float] = defaultdict(float)
    for operation in operations:
        if (work := work_of(operation.op_name)) is not None:
            seconds[work] += operation.seconds
    if stages == 1 or not seconds:
        return None
    ticks = lockstep(plan)
    used = ticks.microbatches * ticks.chunks / ticks.layer_ticks
    predicted = None if plan.estimate is None else plan.estimate.time.get("bubble")
    return PipelineTime(seconds=dict(seconds), waits=1.0 - used, predicted_seconds=predicted)
