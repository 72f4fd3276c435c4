"""How long a pipeline's stages take together, and how many microbatches each holds."""

from __future__ import annotations

import dataclasses
import math


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
