"""The backward pass of a chunk in two: what its stage hands back first, gradients of its weights later."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .schedule import Unit
from .split import Halves, split
from .stream import Stream

Array = Any

# Gives, of a chunk's parameters, its unit, what is kept of it and the gradients of what it gave: those of the
# parameters and of what travelled.
Back = Callable[[Sequence[Array], Unit, Stream, Stream], tuple[Sequence[Array], Stream]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InTwo:
    """A chunk's backward pass in two, of parameters whose numbers are `own`."""

    own: tuple[int, ...]
    halves: Halves

    @classmethod
    def of(
        cls,
        back: Back,
        own: Sequence[int],
        trained: Sequence[Array],
        unit: Unit,
        taken: Stream,
        returned: Stream,
    ) -> InTwo:
        """Trace `back` on arguments like these; parameters and the unit are there again later."""
        several = unit.numbers
        given = [*trained, *several, *taken, *returned]
        first, last = len(trained) + len(several), len(given) - len(returned)

        def function(*args: Array) -> list[Array]:
            own = unit.like(args[len(trained) : first])
            grown, left = back(args[: len(trained)], own, list(args[first:last]), list(args[last:]))
            return [*left, *grown]

        count = len(jax.eval_shape(function, *given)) - len(own)
        awaited = [n < count for n in range(count + len(own))]
        again = [n < first for n in range(len(given))]
        return cls(own=tuple(own), halves=split(function, given, awaited, again))

    @property
    def late_places(self) -> list[int]:
        """The numbers of the parameters whose gradients are late."""
        return self._places(late=True)

    def blank(self, count: int) -> list[Array]:
        """Return room for what is kept of so many units."""
        return [jnp.zeros((count, *one.shape), one.dtype) for one in self.halves.residuals]

    def early(
        self, trained: Sequence[Array], unit: Unit, taken: Stream, returned: Stream
    ) -> tuple[dict[int, Array], Stream, list[Array]]:
        """Return gradients of parameters by their numbers and of the input, and what is to be kept."""
        found = core.jaxpr_as_fun(self.halves.early)(*trained, *unit.numbers, *taken, *returned)
        places = self._places(late=False)
        count = len(self.halves.is_late) - len(self.own)
        grown = dict(zip(places, found[count:], strict=False))
        return grown, found[:count], found[count + len(places) :]

    def late(self, trained: Sequence[Array], unit: Unit, kept: Sequence[Array]) -> list[Array]:
        """Return the gradients of the `late_places`."""
        return core.jaxpr_as_fun(self.halves.late)(*trained, *unit.numbers, *kept)

    def _places(self, *, late: bool) -> list[int]:
        flags = self.halves.is_late[len(self.halves.is_late) - len(self.own) :]
        return [n for n, one in zip(self.own, flags, strict=True) if one == late]
