"""The schedule of a pipeline: what all stages do in a tick, and which part of the batch that is of.

p stages hold the layers one after another, and M microbatches go through them (1F1B). All stages do the same
in a tick, so that there is no conditional and one program for all:

    embed    the rows of the next tick's microbatch, on their way into the first stage
    forward  stage s takes microbatch t - s
    head     the rows of the microbatch that has left the last stage, to the loss and back
    backward stage s takes microbatch t - 2(p - 1) + s
    learn    the gradient of what embedded the rows that left the first stage a tick ago

Embedding and head are shared by rows: each stage takes 1/p of a microbatch's. So they take M ticks, as if the
layers' stages did not wait; forward and backward take M + p - 1. A stage holds the inputs of 2p - 1
microbatches, however many there are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

EMBED, FORWARD, HEAD, BACKWARD, LEARN = "embed", "forward", "head", "backward", "learn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """`ticks` in which all stages do `work`."""

    work: frozenset[str]
    ticks: int


def stretches(stages: int, microbatches: int, *, learns: bool) -> list[Stretch]:
    """Return what is done from tick -1 on.

    >>> [(one.ticks, sorted(one.work)) for one in stretches(2, 8, learns=False)]
    [(1, ['embed']), (1, ['embed', 'forward']), (8, ['embed', 'forward', 'head'])]
    """
    full = {EMBED, FORWARD, HEAD} | ({BACKWARD, LEARN} if learns else set())
    found = [({EMBED}, 1), ({EMBED, FORWARD}, stages - 1), (full, microbatches)]
    if learns:
        found += [({BACKWARD, LEARN}, stages - 1), ({LEARN}, 1)]
    return [Stretch(work=frozenset(work), ticks=ticks) for work, ticks in found if ticks]


def ring(stages: int) -> int:
    """Return for how many microbatches a stage holds its input."""
    return 2 * stages - 1


def forward_at(tick: Any, stage: Any) -> Any:
    """Return the microbatch that a stage takes forward; those beyond the first and the last are none."""
    return tick - stage


def backward_at(tick: Any, stage: Any, stages: int) -> Any:
    """Return the microbatch that a stage takes backward; those beyond the first and the last are none."""
    return tick - 2 * (stages - 1) + stage


def is_one(microbatch: Any, microbatches: int) -> Any:
    """Whether there is such a microbatch."""
    return (microbatch >= 0) & (microbatch < microbatches)


def nearest_one(microbatch: Any, microbatches: int) -> Any:
    """Return the microbatch, or the first or last one."""
    return jnp.clip(microbatch, 0, microbatches - 1)
