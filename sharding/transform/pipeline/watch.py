"""Where a value is first not finite in a pipeline: one number that says when, in which work, stage and layer.

Each stage keeps the least number of its faults, so that the least of all stages is the first: work of a later
tick has a greater one, and work that others wait for within a tick a smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from .beside import backward_later, forward_later
from .schedule import BACKWARD, EMBED, FORWARD, HEAD, LEARN, WEIGHTS, backward_at, forward_at, unit_at
from .slots import Slots, layers_of_chunk

Array = Any

# In the order in which they hand on within a tick, from one stack of layers to the next too.
_WORK = (FORWARD, EMBED, LEARN, HEAD, BACKWARD, WEIGHTS)
_OF_LAYERS = (FORWARD, BACKWARD, WEIGHTS)
NOWHERE = 2**31 - 1
# Of what is worked out of sums over the whole batch, before any gradient goes back.
BEHIND_SUMS = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A value that is not finite: the `work` of a microbatch, of layers' work in which layer.

    `stage` and `chunk` have the layer; embedding and head are shared by all stages. `stack` is the stack of
    layers, as they run: of ``embed`` and ``learn`` the one that is entered, of ``head`` the last.
    """

    work: str
    microbatch: int
    tick: int
    layer: int | None = None
    stage: int | None = None
    chunk: int | None = None
    stack: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbering:
    """Numbers of faults in stacks of so many `layers`, in `stages` stages of `chunks` chunks of each.

    Ticks are those of a stack alone; numbers and faults have them as all stacks count them.

    >>> stacks = Numbering(layers=(8, 4), stages=2, chunks=2)
    >>> stacks.fault(int(stacks.number(jnp.int32(5), FORWARD, jnp.int32(1), jnp.int32(1))))
    Fault(work='forward', microbatch=2, tick=5, layer=3, stage=1, chunk=0, stack=0)
    >>> stacks.fault(int(stacks.number(jnp.int32(5), FORWARD, jnp.int32(1), jnp.int32(0), stack=1)))
    Fault(work='forward', microbatch=2, tick=9, layer=1, stage=1, chunk=0, stack=1)
    """

    layers: tuple[int, ...]
    stages: int
    chunks: int = 1

    @classmethod
    def of(cls, stacks: Sequence[Slots]) -> Numbering:
        """Return the numbering of faults in these stacks."""
        layers = tuple(one.layers for one in stacks)
        return cls(layers=layers, stages=stacks[0].stages, chunks=stacks[0].chunks)

    def number(self, tick: Array, work: str, stage: Array, layer: Array, stack: int = 0) -> Array:
        """Return the number of a fault: `layer` is counted from the first of the stage's chunk."""
        # Ticks begin at -1.
        turn = (tick + self._later(work, stack) + 1) * len(_WORK) + _WORK.index(work)
        place = (turn * len(self.layers) + stack) * self.stages + stage
        return (place * self._most + layer).astype(jnp.int32)

    def fault(self, number: int) -> Fault | None:
        """Return the fault of a `number`, None for none of a pipeline's."""
        if number in (NOWHERE, BEHIND_SUMS):
            return None
        rest, layer = divmod(number, self._most)
        rest, stage = divmod(rest, self.stages)
        rest, stack = divmod(rest, len(self.layers))
        turn, work = divmod(rest, len(_WORK))
        tick, name, shape = turn - 1, _WORK[work], (self.stages, self.chunks)
        alone = tick - self._later(name, stack)
        if name in _OF_LAYERS:
            unit = unit_at(name, alone, stage, *shape)
            return Fault(
                work=name,
                microbatch=int(unit.microbatch),
                tick=tick,
                layer=(unit.chunk * self.stages + stage) * self._each(stack) + layer,
                stage=stage,
                chunk=int(unit.chunk),
                stack=stack,
            )
        units = {
            EMBED: forward_at(alone + 1, 0, *shape),
            HEAD: forward_at(alone, self.stages - 1, *shape),
            LEARN: backward_at(alone - 1, 0, *shape),
        }
        return Fault(work=name, microbatch=int(units[name].microbatch), tick=tick, stack=stack)

    def _later(self, work: str, stack: int) -> int:
        """Return how many ticks later than alone a stack does some work."""
        if work in (FORWARD, EMBED, HEAD):
            return forward_later(stack, self.stages, self.chunks)
        return backward_later(stack, len(self.layers), self.stages, self.chunks)

    def _each(self, stack: int) -> int:
        return layers_of_chunk(self.layers[stack], self.stages, self.chunks)

    @property
    def _most(self) -> int:
        return max(map(self._each, range(len(self.layers))))


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
