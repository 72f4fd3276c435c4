"""Stages as other frameworks run them: how long they wait, and how many microbatches each holds.

Each stage has a program of its own. The first has what comes before the layers, the last one the loss, and a
stage holds the activations of microbatches that are still to come back.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
from meshwright.sharding.cost import memory
from meshwright.sharding.cost.candidate import Candidate
from meshwright.sharding.cost.kept import Residuals
from meshwright.sharding.cost.living import Worked
from meshwright.sharding.cost.memory import Holding, Standing
from meshwright.sharding.cost.profile import AFTER, BEFORE, LAYERS, ProgramTables
from meshwright.sharding.cost.step import StepParts, exposed, microbatch, reduce_once

# How layers are dealt to so many stages.
DealtBy = Callable[[ProgramTables, int], "Dealt"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Seconds of one microbatch, forward and backward: on the slowest stage, and on all of them in turn."""

    slowest: float
    together: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dealt:
    """How many layers the fullest stages and the last one hold."""

    most: int
    last: int


def deal(layers: int, stages: int) -> Dealt:
    """Return how `layers` are dealt to `stages`: evenly, the last stage's filled up where they do not divide.

    >>> deal(80, 32)
    Dealt(most=3, last=3)
    """
    most = math.ceil(layers / stages)
    return Dealt(most=most, last=most)


def bubble_seconds(stages: Stages, interleave: int) -> float:
    """Return how long the slowest stage waits in a step.

    The first microbatch fills the pipeline and the last one drains it: together every other stage's forward
    and backward pass, whichever of 1F1B and GPipe is run: (p - 1) (t_f + t_b) for p equal stages.
    Interleaved, a stage waits for one of its v chunks at a time, for (p - 1) (t_f + t_b) / v (Narayanan et
    al. 2021, section 2.2).

    >>> bubble_seconds(Stages(slowest=0.5, together=2.0), interleave=2)
    0.75
    """
    return max(0.0, stages.together - stages.slowest) / interleave


def in_flight(stage: int, stages: int, microbatches: int, schedule: str, interleave: int) -> float:
    """Return for how many microbatches a stage holds activations at its fullest.

    GPipe holds all. 1F1B holds those whose forward pass is done and whose backward pass is still to come back
    from the end: as many as there are stages from this one on. Interleaved, the first stage starts its chunks
    earlier by p - 1 chunks of L / (p v) layers each: 1 + (p - 1) / (p v) times as much (Korthikanti et al.
    2022, section 4.2.3).
    """
    if stages == 1:
        return 1.0
    if schedule == "gpipe":
        return float(microbatches)
    held = float(min(microbatches, stages - stage))
    if interleave > 1 and stage == 0:
        held *= 1.0 + (stages - 1) / (stages * interleave)
    return min(held, float(microbatches))


def dealt_evenly(profile: ProgramTables, stages: int) -> Dealt:
    """Return as many layers for every stage, as stages that are slices of one array have."""
    return deal(profile.layers, stages)


def step_through_stages(dealt_by: DealtBy, parts: StepParts) -> dict[str, float]:
    """Return the seconds of a step over stages, by item."""
    table, candidate, calibration = parts.table, parts.candidate, parts.calibration
    stages = candidate.mesh["stage"]
    dealt = dealt_by(table, stages)
    items = microbatch(parts)
    per_section = np.zeros(3)
    for row in items.values():
        per_section += row
    # The first stage has what comes before the layers, the last one the loss: the step waits for the slower.
    first = np.array([1.0, dealt.most / table.layers, 0.0])
    last = np.array([0.0, dealt.last / table.layers, 1.0])
    busiest = first if per_section @ first >= per_section @ last else last
    slowest = float(per_section @ busiest)
    # A microbatch's stream goes forward and its gradient, as large, back.
    sent = parts.wires["stage"].point_to_point(2.0 * stream_bytes(parts), 2.0)
    send = exposed(sent, slowest, calibration.overlap_stages)
    time: dict[str, float] = defaultdict(float)
    for name, row in items.items():
        time[name] += float(row @ busiest) * candidate.microbatches
    together = float(per_section[BEFORE] + per_section[AFTER] + per_section[LAYERS])
    # A microbatch passes each of a stage's chunks: so many borders as there are chunks.
    time["send/stage"] = send * candidate.microbatches * candidate.interleave
    count = Stages(slowest=slowest + send, together=max(together, slowest) + stages * send)
    time["bubble"] = bubble_seconds(count, candidate.interleave)
    time["host"] += calibration.microbatch_seconds * candidate.microbatches
    reduce_once(time, parts, busiest)
    return time


def moments(
    dealt_by: DealtBy,
    profile: ProgramTables,
    candidate: Candidate,
    stored: Standing,
    work: Worked,
    kept: Residuals,
    last_layer_apart: bool,
) -> Iterator[dict[str, float]]:
    """Yield item → bytes at each moment that may be the fullest: of the first stage, and of the last one."""
    stages = candidate.mesh.get("stage", 1)
    if stages == 1:
        yield from memory.moments(profile, candidate, stored, work, kept, last_layer_apart)
        return
    dealt = dealt_by(profile, stages)
    for stage, layers in ((0, dealt.most), (stages - 1, dealt.last)):
        held = Holding(
            here=np.array([float(stage == 0), layers / profile.layers, float(stage > 0)]),
            microbatches=in_flight(
                stage, stages, candidate.microbatches, candidate.schedule, candidate.interleave
            ),
        )
        yield from memory.moments_of(profile, candidate, stored, work, kept, held, last_layer_apart)


def stream_bytes(parts: StepParts) -> float:
    """Return the bytes of a microbatch that layers hand on, on a device."""
    carries = list(parts.table.carries)
    if not carries:
        return 0.0
    return float((parts.table.values.bytes * parts.placement.value_fraction)[carries].sum())
