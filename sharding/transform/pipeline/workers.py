"""What the device of a stage does, tick by tick, with its layers of several stacks (`beside`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .beside import StackStretch, StackWork, backward_later, forward_later, stretches, waits
from .chunk import filled
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

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Workers:
    """Works the parts of one device through: a `Worker` of each stack of layers, which know the same."""

    stacks: Sequence[Worker]

    def run(self, sums: Any) -> tuple[Any, Any, Any]:
        """Return the sums, the gradients of the first one's `places`, and rows of all microbatches."""
        first = self.stacks[0]
        learns = bool(first.places)
        state: dict[str, Any] = {"sums": sums, "stacks": [], "shares": []}
        for one in self.stacks:
            blank = one.stages.blank()
            own: dict[str, Any] = {"next": blank, "sent": blank}
            state["stacks"].append(own | (one.learning() if learns else {}))
        if learns:
            state["gradients"] = first.no_gradients()
            state["shares"] = [self._room(stack) for stack in range(len(self.stacks) - 1)]
        tick, rows = -1, []
        delayed = [k for k, own in enumerate(state["stacks"]) if "kept" in own]
        count = len(self.stacks)
        for one in stretches(self._stages, first.microbatches, count, learns=learns, delayed=delayed):
            state, found = self._stretch(one, state, tick)
            rows += [found] if StackWork(HEAD, len(self.stacks) - 1) in one.work else []
            tick += one.ticks
        parts = [jnp.concatenate(some) for some in zip(*rows, strict=True)]
        return state["sums"], state.get("gradients", []), parts

    def _stretch(self, one: StackStretch, state: Any, first: int) -> tuple[Any, Any]:
        def tick(state: Any, t: Array) -> tuple[Any, Any]:
            return self._tick(one.work, state, t)

        return lax.scan(tick, state, first + jnp.arange(one.ticks))

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
                own[k], given[k] = one.forward(own[k], t - forward_later(k, self._stages))
        for k, one in self._of(EMBED, work):
            with named(EMBED):
                own[k] = one.embed(own[k], t) if k == 0 else self._across(k, state, t, given[k - 1])
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
                found = one.head(self._all(state, k), t - forward_later(k, self._stages), given[k])
                after, parts, gradient = found
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

    def _across(self, k: int, state: Any, t: Array, given: Stream) -> Any:
        """Take what has left the stack before into stack k, each stage its share of the rows."""
        before, after = self.stacks[k - 1], self.stacks[k]
        left = forward_at(t - forward_later(k - 1, self._stages), self._stages - 1, self._stages)
        share = before.stages.shared_out(given, before.stages.index == self._stages - 1)
        if state["shares"]:
            room = state["shares"][k - 1]
            place, kept = t % (self._span(k) + 1), self._known(k - 1, share)
            state["shares"][k - 1] = [all_.at[place].set(one) for all_, one in zip(room, kept, strict=True)]
        entered = after.entered(before.leave(before.leaves, share, before.micro(left.microbatch)))
        return {**state["stacks"][k], "next": after.stages.put_together(entered)}

    def _back_across(self, k: int, state: Any, t: Array) -> Stream:
        """Take the gradient of what entered stack k to the last stage of the one before it."""
        before, after = self.stacks[k - 1], self.stacks[k]
        number = backward_at(t - self._back(k) - 1, 0, self._stages).microbatch
        real, microbatch = is_one(number, before.microbatches), before.micro(number)
        place = (t - self._span(k)) % (self._span(k) + 1)
        kept = iter([room[place] for room in state["shares"][k - 1]])
        items = before.stages.items
        share = [
            one if item.kind == CONSTANT else next(kept)
            for one, item in zip(self._shares(k - 1), items, strict=True)
        ]
        places = before.places_in(before.cut.leave.reads)

        def across(trained: Sequence[Array], learning: Stream) -> Stream:
            leaves = filled(before.leaves, places, trained)
            found = after.entered(before.leave(leaves, before.stages.joined(learning, share), microbatch))
            return [one for one in found if jnp.issubdtype(one.dtype, jnp.inexact)]

        _, pull = jax.vjp(across, [before.leaves[n] for n in places], before.stages.learning(share))
        left = state["stacks"][k]["left"]
        grown, back = pull(after.stages.shares_of_gradient(left, after.stages.index == 0))
        state["gradients"] = before.grown(state["gradients"], places, grown, real)
        return before.stages.gradient_of_shares(back, before.stages.index == self._stages - 1)

    def _room(self, stack: int) -> list[Array]:
        """Return room for the shares of what a stack has given, until their gradients come back."""
        held = self._span(stack + 1) + 1
        return [jnp.zeros((held, *one.shape), one.dtype) for one in self._known(stack, self._shares(stack))]

    def _shares(self, stack: int) -> Stream:
        """Return zeros for a share of what a stack gives."""
        items = zip(self.stacks[stack].stages.items, self.stacks[stack].stages.blank(), strict=True)
        return [
            one
            if item.rows is None
            else lax.slice_in_dim(one, 0, one.shape[item.rows] // self._stages, axis=item.rows)
            for item, one in items
        ]

    def _known(self, stack: int, share: Stream) -> Stream:
        items = self.stacks[stack].stages.items
        return [one for one, item in zip(share, items, strict=True) if item.kind != CONSTANT]

    # Small things

    @property
    def _stages(self) -> int:
        return self.stacks[0].slots.stages

    def _back(self, stack: int) -> int:
        return backward_later(stack, len(self.stacks), self._stages)

    def _span(self, stack: int) -> int:
        """Return how many ticks lie between a microbatch's way into a stack and its gradient's out of it."""
        return waits(stack - 1, len(self.stacks), self._stages)

    def _of(self, what: str, work: frozenset[StackWork]) -> list[tuple[int, Worker]]:
        return [(k, one) for k, one in enumerate(self.stacks) if StackWork(what, k) in work]

    def _all(self, state: Any, stack: int) -> dict[str, Any]:
        """Return what one stack's worker takes for its state."""
        return {**state["stacks"][stack], "sums": state["sums"], "gradients": state.get("gradients", [])}

    def _keep(self, state: Any, stack: int, found: dict[str, Any]) -> None:
        """Keep what one stack's worker made of it."""
        for name in ("sums", "gradients"):
            one = found.pop(name)
            if name in state:
                state[name] = one
        state["stacks"][stack] = found
