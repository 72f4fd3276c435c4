"""What the device of a stage does, tick by tick, with its layers and its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ...program.jaxpr import Pass
from ..meshes import by_device
from .cut import LayerCut
from .schedule import (
    BACKWARD,
    EMBED,
    FORWARD,
    HEAD,
    LEARN,
    Stretch,
    backward_at,
    forward_at,
    is_one,
    nearest_one,
    ring,
    stretches,
)

STAGE = "stage"

Array = Any
# What travels from stage to stage of one microbatch, or its gradient.
_Stream = list[Array]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Worker:
    """Works the parts of one device through; `learnt` outputs have a gradient, of the arguments at `places`.

    `inputs(m, shares)` gives the arguments of microbatch m, of all its rows or of this stage's share of them,
    but for the stored ones, which are `leaves`; `add(sums, outputs)` gives what the outputs of one add up to,
    and its rows. `on_share` and `on_whole` are the passes over the cut's two
    programs, `lies` how what travels lies over automatic axes, where `lying` brings it; `widens` is as of
    `gather.ByHand`.
    """

    cut: LayerCut
    stages: int
    microbatches: int
    on_share: Sequence[Pass]
    on_whole: Sequence[Pass]
    lies: Sequence[PartitionSpec]
    mesh: Any
    leaves: Sequence[Array]
    inputs: Callable[[Array, bool], Sequence[Array]]
    places: Sequence[int]
    cotangents: Sequence[Array]
    lying: Callable[[Any, Any], Array]
    add: Callable[[Any, Sequence[Array]], tuple[Any, Any]]
    widens: bool

    def run(self, sums: Any) -> tuple[Any, Any, Any]:
        """Return the sums, the gradients of `places`, and rows of all microbatches."""
        learns = bool(self.places)
        state: dict[str, Any] = {"sums": sums, "next": self._blank(), "sent": self._blank()}
        if learns:
            blank = self._learning(self._blank())
            held = ring(self.stages)
            state |= {
                "returned": blank,
                "left": blank,
                "ring": [jnp.zeros((held, *one.shape), one.dtype) for one in self._blank()],
                "gradients": [_wide_zeros(self.leaves[n]) for n in self.places],
            }
        tick, parts = -1, None
        for one in stretches(self.stages, self.microbatches, learns=learns):
            state, found = self._stretch(one, state, tick)
            parts = found if HEAD in one.work else parts
            tick += one.ticks
        return state["sums"], state.get("gradients", []), parts

    # One stretch

    def _stretch(self, one: Stretch, state: Any, first: int) -> tuple[Any, Any]:
        def tick(state: Any, t: Array) -> tuple[Any, Any]:
            return self._tick(one.work, state, t)

        return lax.scan(tick, state, first + jnp.arange(one.ticks))

    def _tick(self, work: frozenset[str], state: Any, t: Array) -> tuple[Any, Any]:
        state, parts, given = dict(state), (), None
        if FORWARD in work:
            state, given = self._forward(state, t)
        if EMBED in work:
            # After the forward work has taken what was embedded a tick ago.
            state["next"] = self._gather(self._embed(self.leaves, self._micro(t + 1)))
        if LEARN in work:
            state = self._learn(state, t)
        gradient = None
        if HEAD in work:
            assert given is not None
            state, parts, gradient = self._head(state, t, given)
        if BACKWARD in work:
            state = self._backward(state, t, gradient)
        if given is not None:
            state["sent"] = self._pass(given, 1)
        return state, parts

    def _forward(self, state: Any, t: Array) -> tuple[Any, _Stream]:
        microbatch = forward_at(t, self._stage)
        first = self._stage == 0
        taken = [jnp.where(first, a, b) for a, b in zip(state["next"], state["sent"], strict=True)]
        if "ring" in state:
            place = t % ring(self.stages)
            state["ring"] = [held.at[place].set(one) for held, one in zip(state["ring"], taken, strict=True)]
        return state, self._layers(self.leaves, taken, self._micro(microbatch))

    def _head(self, state: Any, t: Array, given: _Stream) -> tuple[Any, Any, _Stream | None]:
        """Take the last stage's rows to the loss, each stage its share, and their gradient back."""
        microbatch = self._micro(t - (self.stages - 1))
        share = self._share(given, self._stage == self.stages - 1)
        if not self.places:
            found = self._leave(self.leaves, share, microbatch)
            state["sums"], parts = self.add(state["sums"], found)
            return state, parts, None
        count, own = len(self.cotangents), self._own(self.cut.leave.reads)

        def leave(trained: Sequence[Array], learning: _Stream) -> tuple[list[Array], list[Array]]:
            leaves = self._filled(own, trained)
            found = self._leave(leaves, self._joined(learning, share), microbatch)
            return found[:count], found[count:]

        trained = [self.leaves[n] for n in own]
        _, pull, found = jax.vjp(leave, trained, self._learning(share), has_aux=True)
        grown, back = pull(list(self.cotangents))
        state["gradients"] = self._grown(state["gradients"], own, grown, True)
        state["sums"], parts = self.add(state["sums"], found)
        return state, parts, self._gather_learning(back)

    def _backward(self, state: Any, t: Array, gradient: _Stream | None) -> Any:
        """Run a stage's layers again on what was their input, and back."""
        number = backward_at(t, self._stage, self.stages)
        real, microbatch = is_one(number, self.microbatches), self._micro(number)
        taken = [held[(number + self._stage) % ring(self.stages)] for held in state["ring"]]
        own = self._own(self.cut.layers.reads)

        def layers(trained: Sequence[Array], learning: _Stream) -> _Stream:
            leaves = self._filled(own, trained)
            return self._learning(self._layers(leaves, self._joined(learning, taken), microbatch))

        _, pull = jax.vjp(layers, [self.leaves[n] for n in own], self._learning(taken))
        given = state["returned"]
        if gradient is not None:
            last = self._stage == self.stages - 1
            given = [jnp.where(last, a, b) for a, b in zip(gradient, given, strict=True)]
        grown, back = pull(given)
        state["gradients"] = self._grown(state["gradients"], own, grown, real)
        state["left"], state["returned"] = back, self._pass(back, -1, learning=True)
        return state

    def _learn(self, state: Any, t: Array) -> Any:
        """Take the gradient of what left the first stage a tick ago to what embedded it."""
        number = backward_at(t - 1, 0, self.stages)
        real, microbatch = is_one(number, self.microbatches), self._micro(number)
        own = self._own(self.cut.enter.reads)
        share = self._share_learning(state["left"], self._stage == 0)
        _, pull = jax.vjp(
            lambda trained: self._learning(self._embed(self._filled(own, trained), microbatch)),
            [self.leaves[n] for n in own],
        )
        state["gradients"] = self._grown(state["gradients"], own, pull(share)[0], real)
        return state

    # The pieces

    def _embed(self, leaves: Sequence[Array], microbatch: Array) -> _Stream:
        inputs = [*leaves, *self.inputs(microbatch, True)]
        found = self.cut.enter.run(self.on_share, inputs)
        shapes = zip(found, self.cut.dims, self.cut.shapes, strict=True)
        return [self.lying(value, dims).astype(shape.dtype) for value, dims, shape in shapes]

    def _layers(self, leaves: Sequence[Array], taken: _Stream, microbatch: Array) -> _Stream:
        inputs = [*leaves, *self.inputs(microbatch, False)]
        held = self.cut.layers.at
        assert held is not None
        length = held.eqn.params["length"]
        beside = [
            lax.dynamic_slice_in_dim(jnp.asarray(one), self._stage * length, length)
            for one in self.cut.stacked.run(self.on_whole, inputs)
        ]
        found = iter(self.cut.layers.run(self.on_whole, inputs, operands=[*taken, *beside]))
        return [next(found) if one else old for one, old in zip(self.cut.carried, taken, strict=True)]

    def _leave(self, leaves: Sequence[Array], share: _Stream, microbatch: Array) -> list[Array]:
        carried = [one for one, is_carried in zip(share, self.cut.carried, strict=True) if is_carried]
        return self.cut.leave.run(self.on_share, [*leaves, *self.inputs(microbatch, True)], known=carried)

    # Rows between stages

    def _pass(self, stream: _Stream, way: int, learning: bool = False) -> _Stream:
        pairs = [(n, (n + way) % self.stages) for n in range(self.stages)]
        return self._each(lambda one, _: lax.ppermute(one, STAGE, pairs), stream, learning)

    def _share(self, stream: _Stream, owner: Array, learning: bool = False) -> _Stream:
        """Give each stage its share of the rows that the stage that is `owner` has; what has none to all."""

        def share(one: Array, rows: int | None) -> Array:
            sent = self._wide(one)
            if rows is None:
                # Of a gradient, one stage's share is enough: those of all are summed.
                return (sent if learning else lax.psum(sent, STAGE)).astype(one.dtype)
            return lax.psum_scatter(sent, STAGE, scatter_dimension=rows, tiled=True).astype(one.dtype)

        return self._each(share, [jnp.where(owner, one, jnp.zeros_like(one)) for one in stream], learning)

    def _share_learning(self, stream: _Stream, owner: Array) -> _Stream:
        return self._share(stream, owner, True)

    def _gather(self, stream: _Stream, learning: bool = False) -> _Stream:
        def gather(one: Array, rows: int | None) -> Array:
            if rows is not None:
                return lax.all_gather(one, STAGE, axis=rows, tiled=True)
            # Each share has a part of its gradient.
            return lax.psum(self._wide(one), STAGE).astype(one.dtype) if learning else one

        return self._each(gather, stream, learning)

    def _gather_learning(self, stream: _Stream) -> _Stream:
        return self._gather(stream, True)

    def _each(
        self, function: Callable[[Array, int | None], Array], stream: _Stream, learning: bool
    ) -> _Stream:
        rows = zip(self.cut.rows, self.lies, strict=True)
        kinds = [kind for kind, one in zip(rows, self.cut.differs, strict=True) if one or not learning]
        return [
            by_device(lambda x, place=place: function(x, place), self.mesh, (spec,), spec)(one)
            for one, (place, spec) in zip(stream, kinds, strict=True)
        ]

    # Small things

    @property
    def _stage(self) -> Array:
        return lax.axis_index(STAGE)

    def _micro(self, number: Array) -> Array:
        return nearest_one(number, self.microbatches)

    def _blank(self) -> _Stream:
        return [jnp.zeros(one.shape, one.dtype) for one in self.cut.shapes]

    def _learning(self, stream: _Stream) -> _Stream:
        return [one for one, differs in zip(stream, self.cut.differs, strict=True) if differs]

    def _joined(self, learning: _Stream, others: _Stream) -> _Stream:
        found = iter(learning)
        pairs = zip(others, self.cut.differs, strict=True)
        return [next(found) if differs else one for one, differs in pairs]

    def _own(self, reads: set[int]) -> list[int]:
        return [n for n in self.places if n in reads]

    def _filled(self, places: Sequence[int], values: Sequence[Array]) -> list[Array]:
        leaves = list(self.leaves)
        for n, value in zip(places, values, strict=True):
            leaves[n] = value
        return leaves

    def _grown(self, totals: list[Array], places: list[int], more: Sequence[Array], real: Any) -> list[Array]:
        grown = dict(zip(places, more, strict=True))
        return [
            total + jnp.where(real, grown[n], 0).astype(total.dtype) if n in grown else total
            for n, total in zip(self.places, totals, strict=True)
        ]

    def _wide(self, value: Array) -> Array:
        if not (self.widens and jnp.issubdtype(value.dtype, jnp.floating)):
            return value
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _wide_zeros(like: Array) -> Array:
    narrow = jnp.issubdtype(like.dtype, jnp.floating) and like.dtype.itemsize < 4
    return jnp.zeros(like.shape, jnp.float32 if narrow else like.dtype)
