"""What the device of a stage does, tick by tick, with its layers of several stacks (`beside`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .beside import StackWork, backward_later, forward_later, stack_rounds, waits
from .chunk import filled
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
)
from .stream import CONSTANT, Stream
from .ticks import Worker
from .watch import NOWHERE

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Workers:
    """Works the parts of one device through: a `Worker` of each stack of layers, which know the same."""

    stacks: Sequence[Worker]

    def run(self, sums: Any) -> tuple[Any, Any, Any]:
        """Return the sums, the gradients of the first one's `places`, and rows of all microbatches.

        Where layers are watched, the number of where a value was first not finite stands behind the sums.
        """
        first, count = self.stacks[0], len(self.stacks)
        learns, watched = bool(first.places), first.slots.watched
        state: dict[str, Any] = {"sums": sums, "stacks": [], "shares": []}
        for one in self.stacks:
            blank = one.stages.blank()
            own: dict[str, Any] = {"next": blank, "sent": blank}
            state["stacks"].append(own | (one.learning() if learns else {}))
        if watched:
            state["first"] = jnp.int32(NOWHERE)
        if learns:
            state["gradients"] = first.no_gradients()
            state["shares"] = [self._room(stack) for stack in range(count - 1)]
        delayed = [k for k, own in enumerate(state["stacks"]) if "kept" in own]
        found = stack_rounds(
            self._stages, first.microbatches, count, self._chunks, learns=learns, delayed=delayed
        )
        state, rows = run_rounds(found, StackWork(HEAD, count - 1), self._tick, state)
        sums = [*state["sums"], *([state["first"]] if watched else [])]
        return sums, state.get("gradients", []), [some[: first.microbatches] for some in rows]

    def _tick(self, work: frozenset[StackWork], state: Any, t: Array) -> tuple[Any, Any]:
        state = {**state, "stacks": [dict(one) for one in state["stacks"]], "shares": list(state["shares"])}
        own, last, parts = state["stacks"], len(self.stacks) - 1, ()
        self.stacks[0].stages.begin()
        returned: dict[int, Stream] = {}
        given: dict[int, Stream] = {}
        gradients: dict[int, Stream] = {}
        for k, one in self._of(BACKWARD, work):
            with named(SEND):
                returned[k] = one.stages.hand_on(own[k]["left"], -1, learning=True)
        for k, one in self._of(FORWARD, work):
            with named(FORWARD):
                after, given[k] = one.forward(self._all(state, k), t - self._ahead(k))
                self._keep(state, k, after)
        for k, one in self._of(EMBED, work):
            with named(EMBED):
                if k:
                    self._across(k, state, t, given[k - 1])
                else:
                    self._keep(state, k, one.embed(self._all(state, k), t))
        for k, one in self._of(LEARN, work):
            with named(LEARN):
                if k:
                    gradients[k - 1] = self._back_across(k, state, t)
                else:
                    self._keep(state, k, one.learn(self._all(state, k), t - self._back(k)))
        for k, one in self._of(WEIGHTS, work):
            with named(WEIGHTS):
                self._keep(state, k, one.weights(self._all(state, k), t - self._back(k)))
        for k, one in self._of(HEAD, work):
            with named(HEAD):
                after, parts, gradient = one.head(self._all(state, k), t - self._ahead(k), given[k])
                self._keep(state, k, after)
                if gradient is not None:
                    gradients[last] = gradient
        for k, one in self._of(BACKWARD, work):
            with named(BACKWARD):
                after = one.backward(self._all(state, k), t - self._back(k), returned[k], gradients.get(k))
                self._keep(state, k, after)
        for k, one in self._of(FORWARD, work):
            with named(SEND):
                own[k]["sent"] = one.stages.hand_on(given[k], 1)
        return state, parts

    # Between two stacks

    def _across(self, k: int, state: Any, t: Array, given: Stream) -> None:
        """Take what has left the stack before into stack k, each stage its share of the rows."""
        before, after = self.stacks[k - 1], self.stacks[k]
        number = forward_at(t + 1 - self._ahead(k), 0, self._stages, self._chunks).microbatch
        share = before.stages.shared_out(given, before.stages.index == self._stages - 1)
        if state["shares"]:
            room, place = state["shares"][k - 1], number % self._held(k - 1)
            kept = self._known(k - 1, share)
            state["shares"][k - 1] = [all_.at[place].set(one) for all_, one in zip(room, kept, strict=True)]
        entered = self._crossings[k - 1](share, before.micro(number))
        own, real = self._all(state, k), is_one(number, before.microbatches)
        own = after.watched(own, t - self._ahead(k), EMBED, real, entered)
        self._keep(state, k, {**own, "next": after.stages.put_together(entered)})

    def _back_across(self, k: int, state: Any, t: Array) -> Stream:
        """Take the gradient of what entered stack k to the last stage of the one before it."""
        before, after = self.stacks[k - 1], self.stacks[k]
        number = backward_at(t - self._back(k) - 1, 0, self._stages, self._chunks).microbatch
        real, microbatch = is_one(number, before.microbatches), before.micro(number)
        place = number % self._held(k - 1)
        kept = iter([room[place] for room in state["shares"][k - 1]])
        items = before.stages.items
        share = [
            one if item.kind == CONSTANT else next(kept)
            for one, item in zip(self._shares(k - 1), items, strict=True)
        ]
        places = before.places_in(before.cut.leave.reads)
        gradient = after.stages.shares_of_gradient(state["stacks"][k]["left"], after.stages.index == 0)
        grown, back = self._crossings_back[k - 1](share, microbatch, gradient)
        counted = real & before.stages.counts
        state["gradients"] = before.grown(state["gradients"], places, grown, counted)
        own = after.watched(self._all(state, k), t - self._back(k), LEARN, real, [*grown, *back])
        self._keep(state, k, own)
        return before.stages.gradient_of_shares(back, before.stages.index == self._stages - 1)

    @functools.cached_property
    def _crossings(self) -> list[Once]:
        """Of a share of what each stack gives, and its microbatch: what enters the next."""

        def crossing(before: Worker, after: Worker) -> Once:
            return Once(lambda share, number: after.entered(before.leave(before.leaves, share, number)))

        return list(map(crossing, self.stacks[:-1], self.stacks[1:]))

    @functools.cached_property
    def _crossings_back(self) -> list[Once]:
        """Of these and the gradient of what enters: those of the parameters read between, and the share's."""

        def crossing(before: Worker, after: Worker) -> Once:
            places = before.places_in(before.cut.leave.reads)

            def back(share: Stream, microbatch: Array, gradient: Stream) -> tuple[list[Array], Stream]:
                def across(trained: Sequence[Array], learning: Stream) -> Stream:
                    leaves, whole = (
                        filled(before.leaves, places, trained),
                        before.stages.joined(learning, share),
                    )
                    found = after.entered(before.leave(leaves, whole, microbatch))
                    return [one for one in found if jnp.issubdtype(one.dtype, jnp.inexact)]

                trained = [before.leaves[n] for n in places]
                return jax.vjp(across, trained, before.stages.learning(share))[1](gradient)

            return Once(back)

        return list(map(crossing, self.stacks[:-1], self.stacks[1:]))

    def _room(self, stack: int) -> list[Array]:
        """Return room for the shares of what a stack has given, until their gradients come back."""
        held = self._held(stack)
        return [jnp.zeros((held, *one.shape), one.dtype) for one in self._known(stack, self._shares(stack))]

    def _shares(self, stack: int) -> Stream:
        """Return zeros for a share of what a stack gives."""
        items = zip(self.stacks[stack].stages.items, self.stacks[stack].stages.blank(), strict=True)
        return [
            one
            if item.rows is None
            else lax.slice_in_dim(
                one, 0, one.shape[item.rows] // self.stacks[stack].stages.sharers, axis=item.rows
            )
            for item, one in items
        ]

    def _known(self, stack: int, share: Stream) -> Stream:
        items = self.stacks[stack].stages.items
        return [one for one, item in zip(share, items, strict=True) if item.kind != CONSTANT]

    # Small things

    @property
    def _stages(self) -> int:
        return self.stacks[0].slots.stages

    @property
    def _chunks(self) -> int:
        return self.stacks[0].slots.chunks

    def _ahead(self, stack: int) -> int:
        return forward_later(stack, self._stages, self._chunks)

    def _back(self, stack: int) -> int:
        return backward_later(stack, len(self.stacks), self._stages, self._chunks)

    def _held(self, stack: int) -> int:
        """Return how many microbatches lie between their way out of a stack and their gradient's into it."""
        return waits(stack, len(self.stacks), self._stages) + 1

    def _of(self, what: str, work: frozenset[StackWork]) -> list[tuple[int, Worker]]:
        return [(k, one) for k, one in enumerate(self.stacks) if StackWork(what, k) in work]

    def _all(self, state: Any, stack: int) -> dict[str, Any]:
        """Return what one stack's worker takes for its state."""
        shared = {name: state[name] for name in ("sums", "first") if name in state}
        return {**state["stacks"][stack], **shared, "gradients": state.get("gradients", [])}

    def _keep(self, state: Any, stack: int, found: dict[str, Any]) -> None:
        """Keep what one stack's worker made of it."""
        own = dict(found)
        for name in ("sums", "gradients", "first"):
            if name in own:
                one = own.pop(name)
                if name in state:
                    state[name] = one
        state["stacks"][stack] = own
