"""How long a pipeline's stages take together, and how many microbatches each holds."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Seconds of one microbatch, forward and backward: on the slowest stage, and on all of them in turn."""

    count: int
    slowest: float
    together: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dealt:
    """How many layers the fullest stages and the last one hold."""

    most: int
    last: int


def deal(layers: int, stages: int, loss_layers: float = 0.0) -> Dealt:
    """Return how `layers` are dealt to `stages`: evenly, or beside a loss that weighs `loss_layers` layers.

    Each stage takes layers until it has its share of all the weight, so the last one gets what the others,
    rounded up, leave.
    """
    if not loss_layers:
        most = math.ceil(layers / stages)
        return Dealt(most=most, last=most)
    share = (layers + loss_layers) / stages
    return Dealt(
        most=min(layers, math.ceil(share)),
        last=max(0, layers - math.ceil(share * (stages - 1))),
    )


def bubble_seconds(stages: Stages, interleave: int) -> float:
    """Return how long the slowest stage waits in a step.

    The first microbatch fills the pipeline and the last one drains it: together every other stage's forward
    and backward pass, whichever of 1F1B and GPipe is run. Interleaved, a stage waits for one of its
    `interleave` chunks at a time (Narayanan et al. 2021, section 2.2).
    """
    return max(0.0, stages.together - stages.slowest) / interleave


def in_flight(stage: int, stages: int, microbatches: int, schedule: str, interleave: int) -> float:
    """Return for how many microbatches a stage holds activations at its fullest.

    GPipe holds all; 1F1B as many as there are stages from this one to the end; interleaved
    1 + (p - 1) / (p v) times that in the first stage (Korthikanti et al. 2022, section 4.2.1).
    """
    if stages == 1:
        return 1.0
    if schedule == "gpipe":
        return float(microbatches)
    held = float(min(microbatches, stages - stage))
    if interleave > 1 and stage == 0:
        held *= 1.0 + (stages - 1) / (stages * interleave)
    return min(held, float(microbatches))
