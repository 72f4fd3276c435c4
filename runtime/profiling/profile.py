"""The record of where steps' time went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...sharding.plans.estimate import Estimate


@dataclass(frozen=True, kw_only=True)
class CollectiveTime:
    """One kind of communication over the same mesh axes, in one step on one device.

    `exposed_seconds` lengthened the step; `overlapped_seconds` passed beside computation.
    """

    kind: str
    axes: str
    count: float
    exposed_seconds: float
    overlapped_seconds: float

    @property
    def label(self) -> str:
        """Kind and axes as one phrase: ``all_gather(fsdp)``."""
        return f"{self.kind}({self.axes})"


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step on one device: compute, exposed collectives, copies, data wait and idle make up its wall time.

    `gap_seconds` passed between the step before and this one, where nobody numbered the steps; it is in none.
    """

    step: int
    device: str
    wall_seconds: float
    compute_seconds: float
    collectives: tuple[CollectiveTime, ...]
    data_wait_seconds: float
    idle_seconds: float
    copy_seconds: float = 0.0
    gap_seconds: float = 0.0

    @property
    def collective_seconds(self) -> float:
        """Communication that nothing hid."""
        return sum(collective.exposed_seconds for collective in self.collectives)


@dataclass(frozen=True, kw_only=True)
class HostStep:
    """One turn of a process's loop; `data_wait_seconds` may have passed while the devices still worked."""

    process: int
    step: int
    wall_seconds: float
    data_wait_seconds: float


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of the program, averaged over steps and devices.

    `seconds` is what it took of a step, without what ran inside of it; `share` is that part of the step.
    `kind` is ``compute``, ``copy`` or a collective with its axes. `source` is ``file:line``, None where XLA
    made it up.
    """

    name: str
    kind: str
    opcode: str
    source: str | None
    op_name: str
    count: float
    seconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class PipelineTime:
    """What a device does for a pipeline in a step, mean over steps and devices.

    Attributes:
        seconds: of ``forward``, ``backward``, ``embed``, ``head``, ``learn`` (the embedding's gradient),
            ``send``, and where they are delayed ``weights`` (their gradients, for which no stage waits).
        waits: the share of ticks forward, and of those backward, in which a stage has no microbatch.
        predicted_seconds: the bubble of the plan's estimate, None where it has none.
    """

    seconds: Mapping[str, float]
    waits: float
    predicted_seconds: float | None

    @property
    def bubble_seconds(self) -> float:
        """What layers took in ticks without a microbatch, which are as long as others."""
        return self.waits * sum(self.seconds.get(work, 0.0) for work in ("forward", "backward"))


@dataclass(frozen=True, kw_only=True)
class ProgramTime:
    """One program of a trace, on all devices: executions, operations, seconds in which one of them ran."""

    module: str
    executions: int
    operations: int
    busy_seconds: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A captured window of steps: per step and device, per turn of each host's loop, per operation.

    Where a trace has no steps, `steps` is empty, `whole` has each device's time from its first to its last
    operation, and `operations` count for all of that.

    Attributes:
        programs: What ran, program by program, the one that took most first.
        placed: Operations of programs that belong to an execution or a step, and all.
        estimate: What the plan of the run was predicted to cost; None where it was declared.
        pipeline: What stages did and waited; None for a run without stages, or another program's trace.
    """

    platform: str
    module: str
    mesh: dict[str, int]
    files: tuple[str, ...]
    steps: tuple[StepTime, ...]
    host_steps: tuple[HostStep, ...]
    operations: tuple[Operation, ...]
    notes: tuple[str, ...]
    whole: tuple[StepTime, ...] = ()
    programs: tuple[ProgramTime, ...] = ()
    placed: tuple[int, int] = (0, 0)
    estimate: Estimate | None = None
    pipeline: PipelineTime | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices in the profile."""
        return tuple(dict.fromkeys(step.device for step in self.steps or self.whole))

    def mean(self) -> StepTime:
        """Return the mean step over all steps and devices, its `device` being ``all`` and its `step` -1.

        Where there are no steps it is the mean of the whole trace over its devices.
        """
        return _mean(self.steps or self.whole, step=-1)

    def by_step(self) -> tuple[StepTime, ...]:
        """Return each step as the mean over its devices."""
        steps: dict[int, list[StepTime]] = defaultdict(list)
        for time in self.steps:
            steps[time.step].append(time)
        return tuple(_mean(tuple(times), step=step) for step, times in sorted(steps.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return the whole record as plain values for JSON, seconds throughout, with the means worked out."""
        record = asdict(replace(self, estimate=None))
        record["devices"] = list(self.devices)
        record["mean"] = asdict(self.mean())
        record["by_step"] = [asdict(step) for step in self.by_step()]
        if self.pipeline is not None:
            record["pipeline"]["bubble_seconds"] = self.pipeline.bubble_seconds
        record["estimate"] = None if self.estimate is None else self.estimate.to_dict()
        return record


def _mean(times: tuple[StepTime, ...], *, step: int) -> StepTime:
    count = len(times)
    parts: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for collective in (c for time in times for c in time.collectives):
        sums = parts[collective.kind, collective.axes]
        sums[0] += collective.count / count
        sums[1] += collective.exposed_seconds / count
        sums[2] += collective.overlapped_seconds / count
    collectives = [
        CollectiveTime(kind=kind, axes=axes, count=n, exposed_seconds=exposed, overlapped_seconds=hidden)
        for (kind, axes), (n, exposed, hidden) in parts.items()
    ]
    return StepTime(
        step=step,
        device="all",
        wall_seconds=sum(time.wall_seconds for time in times) / count,
        compute_seconds=sum(time.compute_seconds for time in times) / count,
        collectives=tuple(sorted(collectives, key=lambda c: -c.exposed_seconds)),
        copy_seconds=sum(time.copy_seconds for time in times) / count,
        gap_seconds=sum(time.gap_seconds for time in times) / count,
        data_wait_seconds=sum(time.data_wait_seconds for time in times) / count,
        idle_seconds=sum(time.idle_seconds for time in times) / count,
    )
