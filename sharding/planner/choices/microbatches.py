"""Into how many microbatches a batch may be cut, and when it may not be at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ...cost.memory import Ahead
from ...errors import UserError, nearest_divisors
from ...program.jaxpr import Traced
from ...program.program import Program
from ...transform.accumulation.proof import (
    MAX_PASSES,
    InParts,
    apart_in_words,
    opened_in_words,
    prepared_bytes,
    prepared_in_words,
    proved,
    silent_in_words,
    tables_in_words,
)

# Of a forward and a backward pass, the forward one: one product where the backward one has two.
_FORWARD = 1 / 3


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PartsProof:
    """Into how many parts the batch of `program` may go, proved for each number when first asked; `args` are
    its (params, batch).

    With `by_part` the parts' mean is taken, whatever that is of the whole. `known` is what was proved so far.
    """

    program: Program
    args: tuple[Any, ...]
    by_part: bool = False
    max_passes: int = MAX_PASSES
    known: dict[int, InParts | UserError] = dataclasses.field(default_factory=dict)

    def why_not(self, parts: int) -> str | None:
        """Return why `parts` parts do not give the whole batch's value and gradients; None if they do."""
        if parts == 1:
            return None
        if self.by_part:
            if any(argument.is_state for argument in self.program.arguments):
                return (
                    f"microbatches={parts} by part would each change the state by itself; leave out by part"
                )
            return None
        if any(isinstance(one, InParts) and more % parts == 0 for more, one in self.known.items()):
            # What comes in many parts comes in the fewer that divide them.
            return None
        found = self._proved(parts)
        return str(found) if isinstance(found, UserError) else None

    def check(self, parts: int) -> None:
        """Raise UserError where `why_not` has a reason."""
        if reason := self.why_not(parts):
            raise UserError(reason)

    def among(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Return those of `numbers`, smallest first, that can be had."""
        more = [number for number in numbers if number > 1]
        if not more or self.why_not(more[-1]) is None:
            return tuple(numbers)
        if self.why_not(more[0]) is not None:
            return (1,)
        return tuple(number for number in numbers if self.why_not(number) is None)

    @property
    def more_passes(self) -> float:
        """Passes over the batch besides one, in parts of one forward and backward; of what was proved."""
        found = [one.levels for one in self.known.values() if isinstance(one, InParts)]
        if self.by_part or not found:
            return 0.0
        levels = found[0]
        ahead = levels.forward - (levels.last is None)
        return max(ahead, 0) * _FORWARD + len(levels.backward)

    @property
    def ahead(self) -> Ahead | None:
        """What is made of the data before the parts, None where nothing is; of what was proved."""
        found = [one for one in self.known.values() if isinstance(one, InParts) and one.prepared]
        if self.by_part or not found:
            return None
        rows, whole = prepared_bytes(found[0])
        return Ahead(rows=rows, whole=whole, dims=tuple(self.program.batch_dims))

    def notes(self, parts: int) -> tuple[str, ...]:
        """Say what a plan of `parts` parts should tell: its passes, and what is not computed in parts."""
        if parts == 1:
            return ()
        if self.by_part:
            return (
                "accumulation is by part: the result is the mean of what the parts give, not the batch's",
            )
        found = self._proved(parts)
        if isinstance(found, UserError):
            return ()
        passes = found.levels.passes
        several = (
            f"microbatches={parts} take {passes} passes over the batch, since sums over the examples wait "
            "for one another"
        )
        paths = [r.path for r in self.program.results]
        return (
            *((several,) if passes > 1 else ()),
            *prepared_in_words(found),
            *tables_in_words(found, [one.path for one in self.program.arguments if one.is_data]),
            *opened_in_words(found),
            *apart_in_words(found, paths),
            *silent_in_words(found),
        )

    def _proved(self, parts: int) -> InParts | UserError:
        if parts not in self.known:
            results = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in self.program.results]
            traced = Traced(jaxpr=self.program.jaxpr, args=self.args, result=results)
            trained = [n for n, one in enumerate(self.program.parameters) if one.is_trained]
            try:
                self.known[parts] = proved(traced, parts, self.max_passes, trained=trained)
            except UserError as error:
                self.known[parts] = error
        return self.known[parts]


def check_number(microbatches: int) -> None:
    """Raise UserError for a number that is none."""
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise UserError(f"microbatches={microbatches!r} is no whole number from 1")


def options(rows_of_device: int) -> Sequence[int]:
    """Return the numbers of microbatches to consider for the rows of one device: powers of two, and all."""
    return tuple(m for m in divisors(rows_of_device) if m == rows_of_device or m & (m - 1) == 0)


def indivisible(rows: int, parts: Mapping[str, int], microbatches: int, needed: int) -> str:
    """Return the sentence for a batch that does not divide, with the nearest that does."""
    factors = {**parts, "microbatches": microbatches} if microbatches > 1 else dict(parts)
    written = " x ".join(f"{name}={size}" for name, size in factors.items())
    written += f" = {needed}" if len(factors) > 1 else ""
    below = rows // needed * needed
    near = f"{below} or {below + needed} rows" if below else f"{needed} rows"
    devices = needed // microbatches
    if microbatches > 1 and rows and rows % devices == 0:
        near += f", or microbatches={nearest_divisors(rows // devices, microbatches)}"
    return f"a batch of {rows} row{'s' * (rows != 1)} does not divide by {written}; nearest: {near}"


def divisors(number: int) -> Sequence[int]:
    """Return the divisors of `number`, smallest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]
