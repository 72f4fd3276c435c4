"""A chunk's way forward and back in two: what its layers keep goes over the ticks between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .schedule import Unit
from .split import Halves, split
from .stream import Stream, bare, dressed

Array = Any

# Gives, of a chunk's parameters, its unit, what travels into it and the gradients of what it gave: what it
# gives; the gradients of the parameters; and those of what travels.
Both = Callable[[Sequence[Array], Unit, Stream, Stream], tuple[list[Array], Sequence[Array], Stream]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OverTicks:
    """A chunk's way forward and back, cut where the first is done.

    `given` is how many arrays the way forward gives, `own` how many parameters have gradients.
    """

    halves: Halves
    given: int
    own: int

    @classmethod
    def of(
        cls, both: Both, trained: Sequence[Array], unit: Unit, taken: Stream, returned: Stream
    ) -> OverTicks:
        """Trace `both` on arguments like these; parameters and the unit are there again on the way back."""
        several = unit.numbers
        args = [*trained, *several, *taken, *returned]
        first, last = len(trained) + len(several), len(args) - len(returned)
        counts: list[int] = []

        def function(*args: Array) -> list[Array]:
            own = unit.like(args[len(trained) : first])
            given, grown, left = both(args[: len(trained)], own, list(args[first:last]), list(args[last:]))
            counts[:] = [len(given)]
            return [*given, *grown, *left]

        count = len(jax.eval_shape(function, *args))
        halves = split(
            function,
            args,
            awaited=[n < counts[0] for n in range(count)],
            again=[n < first or n >= last for n in range(len(args))],
            new=[n >= last for n in range(len(args))],
        )
        return cls(halves=halves, given=counts[0], own=len(trained))

    def blank(self, count: int) -> list[Array]:
        """Return room for what is kept of so many chunks."""
        shapes = [jax.eval_shape(bare, one) for one in self.halves.residuals]
        return [jnp.zeros((count, *one.shape), one.dtype) for one in shapes]

    def forward(self, trained: Sequence[Array], unit: Unit, taken: Stream) -> tuple[list[Array], list[Array]]:
        """Return what the chunk gives, and what is to be kept."""
        known = [*trained, *unit.numbers, *taken]
        # Nothing on the way forward reads a gradient.
        unread = [jnp.zeros(aval.shape, aval.dtype) for aval in self.halves.early.in_avals[len(known) :]]
        found = core.jaxpr_as_fun(self.halves.early)(*known, *unread)
        return found[: self.given], [bare(one) for one in found[self.given :]]

    def back(
        self, trained: Sequence[Array], unit: Unit, returned: Stream, kept: Sequence[Array]
    ) -> tuple[list[Array], Stream]:
        """Return the gradients of parameters, and of what travelled."""
        pairs = zip(kept, self.halves.residuals, strict=True)
        residuals = [dressed(one, like.dtype) for one, like in pairs]
        found = core.jaxpr_as_fun(self.halves.late)(*trained, *unit.numbers, *returned, *residuals)
        return found[: self.own], found[self.own :]
