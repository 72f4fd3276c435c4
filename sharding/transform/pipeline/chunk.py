"""A chunk of a stage's layers: its way forward, what is kept of it, and its way back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...program.jaxpr import Pass
from .cut import LayerCut
from .delayed import InTwo
from .kept import OverTicks
from .once import Once
from .schedule import Unit, nearest_one
from .slots import Slots
from .stream import CARRIED, CONSTANT, PASSED, Stages, Stream, Travelling
from .watch import are_finite

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChunkWork:
    """Runs the chunks of one stack of layers of one device, forward and back.

    `inputs(m, shares)` gives the arguments of microbatch m, of all its rows or of this stage's share of them,
    but for the stored ones, which are `leaves`; those at `places` have gradients. `on_whole` are the passes
    over the cut's program of whole microbatches; `lying` brings a value to how it lies over automatic axes.
    Where chunks are not run again (`reruns`), what their layers keep is gone back through.
    """

    cut: LayerCut
    slots: Slots
    stages: Stages
    microbatches: int
    on_whole: Sequence[Pass]
    leaves: Sequence[Array]
    inputs: Callable[[Array, bool], Sequence[Array]]
    places: Sequence[int]
    lying: Callable[[Any, Any], Array]
    reruns: bool = True

    # Forward

    def layers_and_kept(self, taken: Stream, unit: Unit) -> tuple[Stream, Array | None, list[Array]]:
        """Run the layers of a chunk, as `layers` does; return also what `back` takes of it."""
        if self.reruns:
            return *self.walked(taken, unit), self._inputs(taken)
        found, kept = self._over_ticks.forward(self.trained_of(unit), unit, taken)
        return found[: len(taken)], next(iter(found[len(taken) :]), None), kept

    def walked(self, taken: Stream, unit: Unit) -> tuple[Stream, Array | None]:
        """Run the layers of a unit's chunk, as `layers` does."""
        return self._walked(taken, unit.numbers)

    @functools.cached_property
    def _walked(self) -> Once:
        def layers(taken: Stream, numbers: Sequence[Array]) -> tuple[Stream, Array | None]:
            unit = self._any_unit.like(numbers)
            return self.layers(self.leaves_of(unit), taken, unit)

        return Once(layers)

    def layers(self, leaves: Sequence[Array], taken: Stream, unit: Unit) -> tuple[Stream, Array | None]:
        """Run a chunk's layers, of which `leaves` has the parameters.

        Where they are watched, say of each whether all that it gives is finite, bool ``[layers]``.
        """
        inputs = [*leaves, *self.inputs(self.micro(unit.microbatch), False)]
        each = self.slots.each
        first = (unit.chunk * self.slots.stages + self.stages.index) * each
        walked = zip(self.cut.stacked.run(self.on_whole, inputs), self.cut.beside, strict=True)
        beside = [jnp.asarray(self.lying(value, dims)) for value, dims in walked]
        if not self.slots.singly:
            beside = [lax.dynamic_slice_in_dim(one, first, each) for one in beside]
            return self._run_layers(inputs, taken, beside, first), None
        stacked = [n for n in self.slots.stored if leaves[n] is not None]

        def one_layer(taken: Stream, number: Array) -> tuple[Stream, Array | None]:
            own = list(inputs)
            for n in stacked:
                own[n] = lax.dynamic_slice_in_dim(leaves[n], number, 1)
            place = jnp.minimum(first + number, self.slots.layers - 1)
            flags = [lax.dynamic_slice_in_dim(one, place, 1) for one in beside]
            found = self._run_layers(own, taken, flags, place)
            found = if_real(first + number < self.slots.layers, found, taken)
            return found, are_finite(found) if self.slots.watched else None

        return lax.scan(one_layer, taken, jnp.arange(each))

    def _run_layers(
        self, inputs: Sequence[Array], taken: Stream, beside: Sequence[Array], first: Array
    ) -> Stream:
        items = self.stages.items
        operands = [one.dressed(value) for value, one in zip(taken, items, strict=True) if one.is_read]
        found = iter(self.cut.layers.run(self.on_whole, inputs, operands=[*operands, *beside]))

        def after(old: Array, one: Travelling) -> Array:
            if one.kind in (CONSTANT, PASSED):
                return old
            new = one.bare(next(found))
            return new if one.kind == CARRIED else lax.dynamic_update_slice_in_dim(old, new, first, 0)

        return [after(old, one) for old, one in zip(taken, items, strict=True)]

    # Back

    def room(self, count: int) -> list[Array]:
        """Return room for what `back` takes of so many chunks."""
        if not self.reruns:
            return self._over_ticks.blank(count)
        return [jnp.zeros((count, *one.shape), one.dtype) for one in self._inputs(self.stages.blank())]

    def back(
        self, trained: Sequence[Array], unit: Unit, kept: Sequence[Array], returned: Stream
    ) -> tuple[list[Array], Stream]:
        """Return the gradients of a chunk's parameters and of what travelled, of what is kept of it."""
        if not self.reruns:
            return self._over_ticks.back(trained, unit, returned, kept)
        return self._gone_back(trained, unit.numbers, kept, returned)

    @functools.cached_property
    def _gone_back(self) -> Once:
        def back(
            trained: Sequence[Array], numbers: Sequence[Array], kept: Sequence[Array], returned: Stream
        ) -> tuple[list[Array], Stream]:
            held = iter(kept)
            taken = [next(held) if one.is_read else one.blank() for one in self.stages.items]
            return self._vjp(trained, self._any_unit.like(numbers), taken)[1](returned)

        return Once(back)

    @functools.cached_property
    def in_two(self) -> InTwo:
        """The way back in two, traced once for all ticks, outside of their loops."""
        unit = self._any_unit
        blank, kept = self.stages.learning(self.stages.blank()), [one[0] for one in self.room(1)]
        return InTwo.of(self.back, self.of_layers, self.trained_of(unit), unit, kept, blank)

    @functools.cached_property
    def _over_ticks(self) -> OverTicks:
        """The way forward and back in two, likewise."""

        def both(
            trained: Sequence[Array], unit: Unit, taken: Stream, returned: Stream
        ) -> tuple[list[Array], Sequence[Array], Stream]:
            given, pull = self._vjp(trained, unit, taken)
            return given, *pull(returned)

        unit, blank = self._any_unit, self.stages.blank()
        return OverTicks.of(both, self.trained_of(unit), unit, blank, self.stages.learning(blank))

    def _vjp(
        self, trained: Sequence[Array], unit: Unit, taken: Stream
    ) -> tuple[list[Array], Callable[[Stream], tuple[list[Array], Stream]]]:
        """Run a chunk's layers; return what they give, and say of each, and what takes gradients back."""
        leaves = self.leaves_of(unit)

        def layers(trained: Sequence[Array], learning: Stream) -> tuple[Stream, list[Array]]:
            own = filled(leaves, self.of_layers, trained)
            given, sound = self.layers(own, self.stages.joined(learning, taken), unit)
            return self.stages.learning(given), [*given, *([] if sound is None else [sound])]

        _, pull, found = jax.vjp(layers, list(trained), self.stages.learning(taken), has_aux=True)
        return found, pull

    # Small things

    def _inputs(self, stream: Stream) -> Stream:
        """Return what of a stream the layers read."""
        rows = zip(stream, self.stages.items, strict=True)
        return [value for value, one in rows if one.is_read]

    @property
    def of_layers(self) -> list[int]:
        """Those of `places` that layers read."""
        return self.places_in(self.cut.layers.reads | self.cut.stacked.reads)

    def leaves_of(self, unit: Unit) -> list[Array]:
        """Return the parameters, of those of layers the ones of a unit's chunk."""
        if self.slots.chunks == 1:
            return list(self.leaves)
        each = self.slots.each
        return [
            lax.dynamic_slice_in_dim(value, unit.chunk * each, each) if n in self.slots.stored else value
            for n, value in enumerate(self.leaves)
        ]

    def trained_of(self, unit: Unit) -> list[Array]:
        """Return the parameters that layers have gradients of, of a unit's chunk."""
        leaves = self.leaves_of(unit)
        return [leaves[n] for n in self.of_layers]

    @property
    def _any_unit(self) -> Unit:
        return Unit(jnp.int32(0), 0 if self.slots.chunks == 1 else jnp.int32(0))

    def micro(self, number: Array) -> Array:
        """Return a microbatch's number, or the first one's or the last's."""
        return nearest_one(number, self.microbatches)

    def places_in(self, reads: set[int]) -> list[int]:
        """Return those of `places` that are read."""
        return [n for n in self.places if n in reads]


def filled(leaves: Sequence[Array], places: Sequence[int], values: Sequence[Array]) -> list[Array]:
    """Return the leaves with other values at some places."""
    found = list(leaves)
    for n, value in zip(places, values, strict=True):
        found[n] = value
    return found


def if_real(real: Any, new: Any, old: Any) -> Any:
    """Return a tree of new values where they are real, else of the old ones."""
    return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, old)
