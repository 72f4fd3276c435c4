"""What the device of a stage does, tick by tick, with its layers and its rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...program.jaxpr import Pass
from .chunk import ChunkWork, filled, if_real
from .loops import run_rounds
from .once import Once
from .schedule import (
    BACKWARD,
    EMBED,
    FORWARD,
    HEAD,
    LEARN,
    SEND,
    WEIGHTS,
    backward_at,
    forward_at,
    is_one,
    named,
    ring,
    rounds,
    ticks_since,
    weights_at,
    weights_since,
)
from .stream import CONSTANT, GIVEN, Stream
from .watch import NOWHERE, Numbering, are_finite, first_layer, last_layer

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Worker(ChunkWork):
    """Works the parts of one device through; outputs with `cotangents` have a gradient.

    `add(sums, outputs)` gives what the outputs of one add up to, and its rows. `on_share` are the passes over
    the cut's program of a share. `waits` are ticks by which the way back is later than the schedule says, for
    other stacks of layers behind these. Gradients of layers' weights may be `delayed`. These layers are the
    `stack`-th of those that `numbering` numbers faults of; ticks are those of a stack alone.
    """

    on_share: Sequence[Pass]
    cotangents: Sequence[Array]
    add: Callable[[Any, Sequence[Array]], tuple[Any, Any]]
    numbering: Numbering
    stack: int = 0
    waits: int = 0
    delayed: bool = False

    def run(self, sums: Any) -> tuple[Any, Any, Any]:
        """Return the sums, the gradients of `places`, and rows of all microbatches.

        Where layers are watched, the number of where a value was first not finite stands behind the sums.
        """
        learns = bool(self.places)
        blank = self.stages.blank()
        state: dict[str, Any] = {"sums": sums, "next": blank, "sent": blank}
        if self.slots.watched:
            state["first"] = jnp.int32(NOWHERE)
        if learns:
            state |= {**self.learning(), "gradients": self.no_gradients()}
        stages, chunks = self._shape
        found = rounds(stages, self.microbatches, chunks, learns=learns, delayed="kept" in state)
        state, rows = run_rounds(found, HEAD, self._tick, state)
        parts = [some[: self.microbatches] for some in rows]
        first = [state["first"]] if self.slots.watched else []
        return [*state["sums"], *first], state.get("gradients", []), parts

    def learning(self) -> dict[str, Any]:
        """Return what of the state of a step is for the way back, but for gradients."""
        blank = self.stages.blank()
        state = {"left": self.stages.learning(blank), "ring": self.room(self._held)}
        if self.delayed and self.in_two.late_places:
            state["kept"] = self.in_two.blank(self.slots.stages)
        return state

    def no_gradients(self) -> list[Array]:
        """Return zeros for the gradients of `places`."""
        return [_wide_zeros(self.leaves[n]) for n in self.places]

    # One tick

    def _tick(self, work: frozenset[str], state: Any, t: Array) -> tuple[Any, Any]:
        state, parts, given = dict(state), (), None
        self.stages.begin()
        # Sent while the layers go forward; what goes forward is sent while they go back.
        returned: Stream = []
        if BACKWARD in work:
            with named(SEND):
                returned = self.stages.hand_on(state["left"], -1, learning=True)
        if FORWARD in work:
            with named(FORWARD):
                state, given = self.forward(state, t)
        if EMBED in work:
            # After the forward work has taken what was embedded a tick ago.
            with named(EMBED):
                state = self.embed(state, t)
        if LEARN in work:
            with named(LEARN):
                state = self.learn(state, t)
        if WEIGHTS in work:
            # Before the backward work keeps what it gives in the same place.
            with named(WEIGHTS):
                state = self.weights(state, t)
        gradient = None
        if HEAD in work:
            assert given is not None
            with named(HEAD):
                state, parts, gradient = self.head(state, t, given)
        if BACKWARD in work:
            with named(BACKWARD):
                state = self.backward(state, t, returned, gradient)
        if given is not None:
            with named(SEND):
                state["sent"] = self.stages.hand_on(given, 1)
        return state, parts

    def embed(self, state: Any, t: Array) -> Any:
        """Make what enters the first stage in the next tick."""
        t = self.stages.after(t)
        entering = forward_at(t + 1, 0, *self._shape).microbatch
        embedded = self._embedded(self.micro(entering))
        state = self.watched(state, t, EMBED, is_one(entering, self.microbatches), embedded)
        return {**state, "next": self.stages.put_together(embedded)}

    def forward(self, state: Any, t: Array) -> tuple[Any, Stream]:
        """Run the layers of a chunk on what was embedded, or came from the stage before."""
        unit = forward_at(t, self._stage, *self._shape)
        enters = (self._stage == 0) & (unit.chunk == 0)
        sent = [self.stages.after(value) for value in state["sent"]]
        taken = [jnp.where(enters, a, b) for a, b in zip(state["next"], sent, strict=True)]
        if "ring" not in state:
            given, sound = self.walked(taken, unit)
        else:
            given, sound, kept = self.layers_and_kept(taken, unit)
            pairs = zip(state["ring"], kept, strict=True)
            state["ring"] = [held.at[t % self._held].set(one) for held, one in pairs]
        if sound is not None:
            real = is_one(unit.microbatch, self.microbatches)
            state = self.watched(state, t, FORWARD, real & ~sound.all(), layer=first_layer(~sound))
        self.stages.done(given)
        return state, given

    def head(self, state: Any, t: Array, given: Stream) -> tuple[Any, Any, Stream | None]:
        """Take the last stage's rows to the loss, each stage its share, and their gradient back."""
        number = forward_at(t, self._last, *self._shape).microbatch
        real, microbatch = is_one(number, self.microbatches), self.micro(number)
        owner = self._stage == self._last
        share = self.stages.shared_out(given, owner)
        if not self.places:
            found = self.leave(self.leaves, share, microbatch)
            sums, parts = self.add(state["sums"], found)
            return {**state, "sums": if_real(real, sums, state["sums"])}, parts, None
        own = self.places_in(self.cut.leave.reads)
        learnt, found, grown, back = self._left(share, microbatch)
        counted = real & self.stages.counts if self._pads else self.stages.counts
        state["gradients"] = self.grown(state["gradients"], own, grown, counted)
        state = self.watched(state, t, HEAD, real, [*learnt, *grown, *back])
        sums, parts = self.add(state["sums"], found)
        state["sums"] = if_real(real, sums, state["sums"])
        return state, parts, self.stages.gradient_of_shares(back, owner)

    @functools.cached_property
    def _left(self) -> Once:
        """Of a share and its microbatch: what is behind the layers, with a gradient and without, and both
        gradients, of the parameters that it reads and of the share.
        """
        count, own = len(self.cotangents), self.places_in(self.cut.leave.reads)

        def left(share: Stream, microbatch: Array) -> tuple[list[Array], list[Array], list[Array], Stream]:
            def leave(trained: Sequence[Array], learning: Stream) -> tuple[list[Array], list[Array]]:
                leaves = filled(self.leaves, own, trained)
                found = self.leave(leaves, self.stages.joined(learning, share), microbatch)
                return found[:count], found[count:]

            trained = [self.leaves[n] for n in own]
            learnt, pull, found = jax.vjp(leave, trained, self.stages.learning(share), has_aux=True)
            return learnt, found, *pull(list(self.cotangents))

        return Once(left)

    def backward(self, state: Any, t: Array, returned: Stream, gradient: Stream | None) -> Any:
        """Take gradients back through a chunk's layers."""
        t = self.stages.after(t)
        unit = backward_at(t, self._stage, *self._shape)
        real = is_one(unit.microbatch, self.microbatches)
        place = (t - ticks_since(unit, self._stage, *self._shape)) % self._held
        own, kept = self.of_layers, [held[place] for held in state["ring"]]
        if gradient is not None:
            leaving = (self._stage == self._last) & (unit.chunk == self._shape[1] - 1)
            returned = [jnp.where(leaving, a, b) for a, b in zip(gradient, returned, strict=True)]
        late: list[Array] = []
        if "kept" not in state:
            grown, state["left"] = self.back(self.trained_of(unit), unit, kept, returned)
        else:
            early, state["left"], late = self.in_two.early(self.trained_of(unit), unit, kept, returned)
            own, grown = list(early), list(early.values())
            pairs = zip(state["kept"], late, strict=True)
            state["kept"] = [held.at[t % self.slots.stages].set(one) for held, one in pairs]
        if self.slots.watched:
            sound = are_finite([*grown, *state["left"]])
            stacked = [one for n, one in zip(own, grown, strict=True) if n in self.slots.stored]
            stacked += [one for one in late if one.shape[:1] == (self.slots.each,)]
            state = self.watched(state, t, BACKWARD, real & ~sound, layer=last_layer(stacked))
        state["gradients"] = self.grown(state["gradients"], own, grown, real, unit.chunk)
        self.stages.done([*state["left"], *grown, *late])
        return state

    def weights(self, state: Any, t: Array) -> Any:
        """Take the gradients of weights, of what the backward work of a tick before has kept."""
        t = self.stages.after(t)
        unit = weights_at(t, *self._shape)
        real = is_one(unit.microbatch, self.microbatches)
        place = (t - weights_since(self._stage)) % self.slots.stages
        late = self.in_two.late_places
        grown = self.in_two.late(self.trained_of(unit), unit, [held[place] for held in state["kept"]])
        if self.slots.watched:
            stacked = [one for n, one in zip(late, grown, strict=True) if n in self.slots.stored]
            fault = real & ~are_finite(grown)
            state = self.watched(state, t, WEIGHTS, fault, layer=last_layer(stacked))
        state["gradients"] = self.grown(state["gradients"], late, grown, real, unit.chunk)
        self.stages.done(grown)
        return state

    def learn(self, state: Any, t: Array) -> Any:
        """Take the gradient of what left the first stage a tick ago to what embedded it."""
        number = backward_at(t - 1, 0, *self._shape).microbatch
        real, microbatch = is_one(number, self.microbatches), self.micro(number)
        own = self.places_in(self.cut.enter.reads)
        grown = self._learnt(self.stages.shares_of_gradient(state["left"], self._stage == 0), microbatch)
        state["gradients"] = self.grown(state["gradients"], own, grown, real & self.stages.counts)
        self.stages.done(grown)
        return self.watched(state, t, LEARN, real, grown)

    @functools.cached_property
    def _learnt(self) -> Once:
        """Of a share of a gradient and its microbatch: the gradients of what embedded it."""
        own = self.places_in(self.cut.enter.reads)

        def learnt(share: Stream, microbatch: Array) -> list[Array]:
            def embed(trained: Sequence[Array]) -> Stream:
                found = self._embed(filled(self.leaves, own, trained), microbatch)
                return [one for one in found if jnp.issubdtype(one.dtype, jnp.inexact)]

            return jax.vjp(embed, [self.leaves[n] for n in own])[1](share)[0]

        return Once(learnt)

    # The pieces

    @functools.cached_property
    def _embedded(self) -> Once:
        return Once(lambda microbatch: self._embed(self.leaves, microbatch))

    def _embed(self, leaves: Sequence[Array], microbatch: Array) -> Stream:
        inputs = [*leaves, *self.inputs(microbatch, True)]
        return self.entered(self.cut.enter.run(self.on_share, inputs))

    def entered(self, found: Sequence[Array]) -> Stream:
        """Return a share of what enters the layers as it is sent."""
        before = [one for one in self.stages.items if one.kind != GIVEN]
        rows = zip(found, before, strict=True)
        # What is a number in the program has a weak type.
        return [one.bare(self.lying(value, one.dims)).astype(one.blank().dtype) for value, one in rows]

    def leave(self, leaves: Sequence[Array], share: Stream, microbatch: Array) -> list[Array]:
        """Return what is behind the layers, of a share of the rows that they give."""
        rows = zip(share, self.stages.items, strict=True)
        known = [one.dressed(value) for value, one in rows if one.kind != CONSTANT]
        return self.cut.leave.run(self.on_share, [*leaves, *self.inputs(microbatch, True)], known=known)

    # Small things

    def watched(
        self,
        state: Any,
        t: Array,
        work: str,
        real: Any,
        values: Sequence[Array] | None = None,
        layer: Any = 0,
    ) -> Any:
        """Return the state with where `real` work of a tick is at fault, if nothing was before.

        It is where `values`, if they are given, are not all finite.
        """
        if not self.slots.watched:
            return state
        fault = real if values is None else real & ~are_finite(values)
        number = self.numbering.number(t, work, self._stage, layer, self.stack)
        return {**state, "first": jnp.minimum(state["first"], jnp.where(fault, number, NOWHERE))}

    @property
    def _stage(self) -> Array:
        return self.stages.index

    @property
    def _last(self) -> int:
        return self.slots.stages - 1

    @property
    def _held(self) -> int:
        """Of how many chunks a stage holds the input."""
        return ring(*self._shape) + self.waits

    @property
    def _shape(self) -> tuple[int, int]:
        """Stages, and chunks of each."""
        return self.slots.stages, self.slots.chunks

    def grown(
        self, totals: list[Array], places: list[int], more: Sequence[Array], real: Any, chunk: Any = None
    ) -> list[Array]:
        """Return the gradients of `places` with more added to some of them, where that is `real`."""
        grown = dict(zip(places, more, strict=True))

        def added(n: int, total: Array) -> Array:
            if n not in grown:
                return total
            own = jnp.where(real, grown[n], 0).astype(total.dtype)
            if chunk is None or self.slots.chunks == 1 or n not in self.slots.stored:
                return total + own
            first, each = chunk * self.slots.each, self.slots.each
            whole = lax.dynamic_slice_in_dim(total, first, each) + own
            return lax.dynamic_update_slice_in_dim(total, whole, first, 0)

        return [added(n, total) for n, total in zip(self.places, totals, strict=True)]

    @property
    def _pads(self) -> bool:
        """Whether groups of microbatches are filled up with some that are none."""
        return self.slots.chunks > 1 and self.microbatches % self.slots.stages > 0


def _wide_zeros(like: Array) -> Array:
    narrow = jnp.issubdtype(like.dtype, jnp.floating) and like.dtype.itemsize < 4
    return jnp.zeros(like.shape, jnp.float32 if narrow else like.dtype)
