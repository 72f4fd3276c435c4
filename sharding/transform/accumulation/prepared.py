"""What a loss makes of the data alone before its parts, of the whole batch: shuffled, sorted, mixed rows.

Rows that meet in such values meet in no part. They depend on no parameter, so that they are made once, and
each part takes its own rows of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from ...program.jaxpr import context_of
from .values import Array, Held, NotInParts, examples

# Times the batch that a value may be large, so that little is held beside it, and elements that are little.
_MOST_BATCHES = 4
_LITTLE = 1 << 20


class _DataEquation(NamedTuple):
    """An equation of the whole batch's program that depends on no parameter."""

    eqn: core.JaxprEqn
    ins: Sequence[Held]
    outs: Sequence[Held]


@dataclasses.dataclass(kw_only=True, eq=False)
class OfData:
    """Equations of a program that depend on no parameter, and which of their results are made ahead.

    The batch has `rows`, and in all `elements`; parts have ``pre * parts * post`` of the rows.
    """

    rows: int
    pre: int
    elements: int
    found: list[_DataEquation] = dataclasses.field(default_factory=list)
    lines: dict[Held, NotInParts] = dataclasses.field(default_factory=dict)

    def add(self, eqn: core.JaxprEqn, ins: Sequence[Held], outs: Sequence[Held]) -> None:
        """Add an equation as the whole batch's program has it."""
        self.found.append(_DataEquation(eqn, tuple(ins), tuple(outs)))

    def prepared(self, outs: Sequence[Held], why: NotInParts) -> bool:
        """Have `outs`, which parts cannot follow for the reason `why`, made ahead, unless they are too large.

        What leads with as many as the rows are is taken for rows, which is no more than a choice: what meets
        others along another dimension is refused.
        """
        if any(math.prod(out.shape) > max(_LITTLE, _MOST_BATCHES * self.elements) for out in outs):
            return False
        for out in outs:
            if out.shape[:1] == (self.rows,):
                out.form = examples(0, self.pre)
            self.lines[out] = why
        return True

    def make(self, values: Sequence[Held], given: Mapping[Held, Array]) -> list[Array]:
        """Return the whole batch's arrays of `values`, from those `given` of the program's arguments."""
        maker = {out: one for one in self.found for out in one.outs}
        wanted, left = set[int](), list(values)
        while left:
            one = maker.get(left.pop())
            if one is not None and id(one) not in wanted:
                wanted.add(id(one))
                left += one.ins
        arrays: dict[Held, Any] = dict(given)
        for one in self.found:
            if id(one) in wanted:
                found = _run(one.eqn, [_array(value, arrays) for value in one.ins])
                arrays.update(zip(one.outs, found, strict=True))
        return [arrays[value] for value in values]


def _array(value: Held, arrays: Mapping[Held, Array]) -> Array:
    if value in arrays:
        return arrays[value]
    # Neither argument nor result: a number that the program holds.
    assert value.op is not None
    assert value.op.run is not None
    return value.op.run(None)[value.op.outs.index(value)]


def _run(eqn: core.JaxprEqn, ins: Sequence[Array]) -> Sequence[Array]:
    with context_of(eqn):
        found = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
    return found if eqn.primitive.multiple_results else [found]
