"""Layers in the slots of a schedule: brought to their stages from where they are stored, and gradients back.

Stage s of p has chunks r p + s, of n layers each. Where that is not one stretch of layers (several chunks, or
a count that stages do not divide), or layers have arrays of their own, stacked parameters are stored over
`stage` in another of their dimensions, or whole: so the state and its checkpoints are the model's own tree,
in its order. An all-to-all over the stages brings each its layers once a step, and one takes their gradients
back. Slots beyond the last layer have copies of it, which are passed by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from ...plans.specs import Spec, axes_in, axes_of, without
from ..meshes import by_device

STAGE = "stage"

Array = Any


def layers_of_chunk(layers: int, stages: int, chunks: int) -> int:
    """Return how many of so many layers a chunk has room for."""
    return math.ceil(layers / (stages * chunks))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """The slots of `layers` in `stages` stages of `chunks` chunks.

    `stored` are the specs of the stacked parameters, by their number among all, `manual` the axes that are
    manual where layers are moved. What is stored over `stage` in its first dimension lies where it is run.
    Layers that are `watched` run one at a time, so that what each gives can be looked at.
    """

    layers: int
    stages: int
    chunks: int
    stored: Mapping[int, Spec]
    manual: tuple[str, ...]
    watched: bool = False

    @property
    def scattered(self) -> bool:
        """Whether the layers of a stage are no stretch of those of all."""
        return self.chunks > 1 or self.layers % self.stages > 0

    def moves(self, number: int) -> bool:
        """Whether stages store other layers of parameter `number` than they run."""
        return number in self.stored and STAGE not in axes_in(self.stored[number][:1])

    @property
    def each(self) -> int:
        """Layers of a chunk."""
        return layers_of_chunk(self.layers, self.stages, self.chunks)

    @property
    def fills(self) -> bool:
        """Whether some slots have no layer of their own."""
        return self.layers < self.each * self.stages * self.chunks

    @property
    def singly(self) -> bool:
        """Whether a chunk's layers run one at a time."""
        return self.fills or self.watched

    @property
    def _order(self) -> np.ndarray:
        """The layer of each slot, one stage after another."""
        numbers = np.arange(self.each * self.stages * self.chunks).reshape(self.chunks, self.stages, -1)
        return np.minimum(numbers.transpose(1, 0, 2).reshape(-1), self.layers - 1)

    @property
    def _places(self) -> np.ndarray:
        """The slot of each layer."""
        slots = np.arange(self.each * self.stages * self.chunks)
        return slots.reshape(self.stages, self.chunks, -1).transpose(1, 0, 2).reshape(-1)[: self.layers]

    def lies(self, number: int, spec: Spec) -> Spec:
        """Return how parameter `number`, or its gradient, lies where it is run, of how it is stored."""
        if not self.moves(number):
            return spec
        return (STAGE, *without(tuple(spec)[1:], (STAGE,)))

    def brought(self, number: int, value: Array) -> Array:
        """Return what a stage runs of parameter `number`, of which it stores `value`."""
        if not self.moves(number):
            return value
        place, mine = self._dimension(number), self.each * self.chunks

        def bring(value: Array) -> Array:
            every = jnp.take(value, self._order, axis=0)
            if place is None:
                return lax.dynamic_slice_in_dim(every, lax.axis_index(STAGE) * mine, mine)
            return lax.all_to_all(every, STAGE, split_axis=0, concat_axis=place, tiled=True)

        return self._by_device(number, bring, value)

    def taken_back(self, number: int, gradient: Array) -> Array:
        """Return the gradient of what a stage stores, of that of what it runs."""
        if not self.moves(number):
            return gradient
        place, mine = self._dimension(number), self.each * self.chunks

        def back(gradient: Array) -> Array:
            if place is None:
                whole = jnp.zeros((mine * self.stages, *gradient.shape[1:]), gradient.dtype)
                found = lax.dynamic_update_slice_in_dim(whole, gradient, lax.axis_index(STAGE) * mine, 0)
            else:
                found = lax.all_to_all(gradient, STAGE, split_axis=place, concat_axis=0, tiled=True)
            return jnp.take(found, self._places, axis=0)

        return self._by_device(number, back, gradient)

    def _dimension(self, number: int) -> int | None:
        entries = enumerate(map(axes_of, self.stored[number]))
        return next((n for n, axes in entries if STAGE in axes), None)

    def _by_device(self, number: int, function: Any, value: Array) -> Array:
        rest = PartitionSpec(*without(tuple(self.stored[number]), self.manual))
        return by_device(function, jax.sharding.get_abstract_mesh(), (rest,), rest)(value)


def slots_of(stacks: Sequence[Slots], number: int) -> Slots:
    """Return the stack of layers that parameter `number` is of; for others, which do not move, the first."""
    return next((one for one in stacks if number in one.stored), stacks[0])
