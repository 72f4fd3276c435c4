"""Values of a program that is worked through in parts, and the operations that make them.

The batch of B rows goes to M parts. Wherever the examples travel, the factor M travels inside of some array
dimension: that dimension has ``pre * M * post`` entries, and part i holds those whose middle digit is i. Rows
by stride have ``pre = B / M`` and ``post = 1``; a reshape, a transposition or a merge with a sequence moves
the factor and leaves its place in the order. Dimensions are never told apart by their size.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ...program.primitives import Trait, primitives

Array = Any

_EACH = primitives(Trait.ELEMENTWISE) - {"random_gamma"}


class Kind(enum.Enum):
    """What the parts hold of a value."""

    SHARED = "shared"
    """The same in every part, whole: from parameters, constants and completed sums."""
    EXAMPLES = "examples"
    """Each part holds its own slice of one dimension."""
    SUM = "sum"
    """An incomplete sum: the value is the sum (or maximum, …) over the parts of what each holds."""
    LATE = "late"
    """Inside of a loop or call: shared, and had only when the sums of that loop are complete."""
    MIXED = "mixed"
    """Examples met in a way that parts cannot follow; an error only where it is needed."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """An order that a sort has brought examples in; `key` is what it sorted them by, if that is one array."""

    key: Held | None


class Form(NamedTuple):
    """A kind; for examples also the dimension that holds them, and how many entries stand before a part.

    order: the sort that examples lie in the order of, in each part in that of its own; None as they came.
    places: of which order each example has its place, which differs from part to part.
    """

    kind: Kind
    axis: int = -1
    pre: int = 1
    order: Order | None = None
    places: Order | None = None

    @property
    def is_moved(self) -> bool:
        """Whether a sort has moved the examples, or this is where it has moved them."""
        return self.order is not None or self.places is not None

    def at(self, axis: int) -> Form:
        """Return the form with the examples along another dimension."""
        return self._replace(axis=axis)


SHARED, SUM, LATE, MIXED = (Form(kind) for kind in (Kind.SHARED, Kind.SUM, Kind.LATE, Kind.MIXED))


def examples(axis: int, pre: int) -> Form:
    """Return the form of a value whose dimension `axis` holds the examples."""
    return Form(Kind.EXAMPLES, axis, pre)


class NotInParts(Exception):
    """What is computed does not come in parts, or not as far as can be proved; `where` is the user's line."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where

    def __str__(self) -> str:
        return f"{self.reason}, at {self.where}" if self.where else self.reason


@dataclasses.dataclass(eq=False)
class Held:
    """An array of the program, by its shape over the whole batch.

    heavy: it depends on a parameter.
    inside: it is shared, and computed beside a part's own values, so that it is had inside of a pass only.
    level, count: how many sums, one after another, it needs complete: of what depends on parameters, and of
        the data alone.
    whole: of a slice, the shared value that it was taken from.
    uneven: why its gradient cannot be made of parts' shares, though it is shared itself.
    numbers: the whole number that each example has, one after another as they came, where it is known now.
    """

    shape: tuple[int, ...]
    dtype: Any
    form: Form = SHARED
    combine: str = "sum"
    heavy: bool = False
    inside: bool = False
    level: int = 0
    count: int = 0
    op: Task | None = None
    whole: Held | None = None
    uneven: NotInParts | None = None
    why: NotInParts | None = None
    numbers: np.ndarray | None = None

    @property
    def kind(self) -> Kind:
        return self.form.kind


@dataclasses.dataclass(eq=False)
class Task:
    """What gives `outs`: ``run(index of the part, *ins)``; a total has no run, it is a sum over all parts.

    `where` is the user's line that needs a total; `stops` says that no gradient goes through.
    """

    run: Callable[..., Sequence[Array]] | None
    ins: list[Held]
    outs: list[Held]
    eqn: Any = None
    where: str = ""
    stops: bool = False

    @property
    def is_total(self) -> bool:
        return self.run is None

    @property
    def stops_gradient(self) -> bool:
        return self.stops or (self.eqn is not None and self.eqn.primitive.name == "stop_gradient")


def learns(value: Held) -> bool:
    """Whether a value can have a gradient."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def is_alike(value: Held, axis: int) -> bool:
    """Whether a shared value is the same all along `axis`, by the operations that gave it."""
    if value.shape[axis] == 1:
        return True
    if value.op is None or value.op.eqn is None:
        return False
    name, ins = value.op.eqn.primitive.name, value.op.ins
    if name == "broadcast_in_dim":
        dims = value.op.eqn.params["broadcast_dimensions"]
        return axis not in dims or is_alike(ins[0], dims.index(axis))
    return name in _EACH and all(one.shape == () or is_alike(one, axis) for one in ins)


def needed(targets: Iterable[Held], known: Iterable[Held] = ()) -> tuple[set[Task], set[Held]]:
    """Return the operations that give `targets` out of `known`, and what these take that none gives."""
    stop, ops, leaves = set(known), set[Task](), set[Held]()
    left = list(targets)
    while left:
        value = left.pop()
        if value in stop or value.op is None or value.op.is_total:
            leaves.add(value)
        elif value.op not in ops:
            ops.add(value.op)
            left += value.op.ins
    return ops, leaves


def evaluate(
    order: Sequence[Task], targets: Sequence[Held], known: Mapping[Held, Array], index: Any
) -> list[Array]:
    """Return the arrays of `targets` in part `index`, given those of `known`."""
    wanted, _ = needed(targets, known)
    arrays = dict(known)
    for op in order:
        if op in wanted and op.run is not None:
            found = op.run(index, *(arrays[value] for value in op.ins))
            arrays.update(zip(op.outs, found, strict=True))
    return [arrays[value] for value in targets]
