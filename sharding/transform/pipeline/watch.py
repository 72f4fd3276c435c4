"""Where a value is first not finite in a pipeline: one number that says when, in which work, stage and layer.

Each stage keeps the least number of its faults, so that the least of all stages is the first: work of a later
tick has a greater one, and work that others wait for within a tick a smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from .schedule import BACKWARD, EMBED, FORWARD, HEAD, LEARN, WEIGHTS, backward_at, forward_at, unit_at
from .slots import Slots

Array = Any

# In the order in which they hand on within a tick.
_WORK = (EMBED, FORWARD, LEARN, HEAD, BACKWARD, WEIGHTS)
NOWHERE = 2**31 - 1
# Of what is worked out of sums over the whole batch, before any gradient goes back.
BEHIND_SUMS = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A value that is not finite: the `work` of a microbatch, of layers' work in which layer.

    `stage` and `chunk` have the layer; embedding and head are shared by all stages.
    """

    work: str
    microbatch: int
    tick: int
    layer: int | None = None
    stage: int | None = None
    chunk: int | None = None


def number_of(slots: Slots, tick: Array, work: str, stage: Array, layer: Array) -> Array:
    """Return the number of a fault: `layer` is counted from the first of the stage's chunk."""
    # Ticks begin at -1.
    turn = (tick + 1) * len(_WORK) + _WORK.index(work)
    return ((turn * slots.stages + stage) * slots.each + layer).astype(jnp.int32)


def fault_of(number: int, layers: int, stages: int, chunks: int = 1) -> Fault | None:
    """Return the fault that `number_of` numbered, None for none of a pipeline's.

    >>> slots = Slots(layers=8, stages=2, chunks=2, stored={}, manual=())
    >>> fault_of(int(number_of(slots, jnp.int32(5), FORWARD, jnp.int32(1), jnp.int32(1))), 8, 2, 2)
    Fault(work='forward', microbatch=2, tick=5, layer=3, stage=1, chunk=0)
    """
    if number in (NOWHERE, BEHIND_SUMS):
        return None
    slots = Slots(layers=layers, stages=stages, chunks=chunks, stored={}, manual=())
    rest, layer = divmod(number, slots.each)
    rest, stage = divmod(rest, stages)
    turn, work = divmod(rest, len(_WORK))
    tick, name = turn - 1, _WORK[work]
    if name in (FORWARD, BACKWARD, WEIGHTS):
        unit = unit_at(name, tick, stage, stages, chunks)
        place = (unit.chunk * stages + stage) * slots.each + layer
        chunk = int(unit.chunk)
        return Fault(
            work=name, microbatch=int(unit.microbatch), tick=tick, layer=place, stage=stage, chunk=chunk
        )
    units = {
        EMBED: forward_at(tick + 1, 0, stages, chunks),
        HEAD: forward_at(tick, stages - 1, stages, chunks),
        LEARN: backward_at(tick - 1, 0, stages, chunks),
    }
    return Fault(work=name, microbatch=int(units[name].microbatch), tick=tick)


def are_finite(values: Sequence[Array]) -> Array:
    """Whether all numbers of all arrays are finite."""
    found = [jnp.isfinite(one).all() for one in values if jnp.issubdtype(one.dtype, jnp.inexact)]
    return jnp.stack(found).all() if found else jnp.bool_(True)


def first_layer(faults: Array) -> Array:
    """Return the number of the first of `faults` ``[layers]``."""
    return jnp.argmax(faults).astype(jnp.int32)


def last_layer(stacked: Sequence[Array]) -> Array:
    """Return the last layer that has a gradient of `stacked` that is not finite, and is the first back."""
    found = [~jnp.isfinite(one).all(axis=tuple(range(1, one.ndim))) for one in stacked]
    if not found:
        return jnp.int32(0)
    faults = jnp.stack(found).any(axis=0)
    return jnp.where(faults.any(), len(faults) - 1 - jnp.argmax(faults[::-1]), 0).astype(jnp.int32)
