"""Dimensions of what attention multiplies, as labels: which dimensions of the scores each of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.extend import core

from .masks import Labels, regroup
from .spans import NotThis
from .values import shape


class PlacedDims:
    """Labels of what is multiplied: which dimensions of scores each dimension of an operand is."""

    def __init__(self, first: core.JaxprEqn, cut: Mapping[int, int] | None = None) -> None:
        """Take a product; `cut` says of a dimension that both operands have how large its major part is.

        The minor part gets a label of its own, after all others.
        """
        (self._contracted, (left, right)) = first.params["dimension_numbers"]
        self._first, self._batch = first, (left, right)
        self.sizes = shape(first.outvars[0])
        ranks = [len(shape(atom)) for atom in first.invars]
        self._free = [
            [d for d in range(rank) if d not in (*contracted, *batch)]
            for rank, contracted, batch in zip(ranks, self._contracted, self._batch, strict=True)
        ]
        count, split = len(self.sizes), len(left) + len(self._free[0])
        self.batch = tuple(range(len(left)))
        self._of_free = [tuple(range(len(left), split)), tuple(range(split, count))]
        self._parts: dict[int, tuple[int, ...]] = {}
        for label, size in (cut or {}).items():
            self._parts[label] = (label, len(self.sizes))
            self.batch += (len(self.sizes),)
            sizes = list(self.sizes)
            self.sizes = (*sizes[:label], size, *sizes[label + 1 :], sizes[label] // size)
        self.query = 0
        self.free: tuple[int, ...] = ()
        self.scores: Labels = tuple(self._parts.get(d, (d,)) for d in range(count))

    def tell(self, keys: int) -> None:
        """Take note of which label is the keys', and with it which operand they are."""
        side = 0 if keys in self._of_free[0] else 1
        if self._of_free[side] != (keys,):
            raise NotThis("")
        self.query, self.free = 1 - side, self._of_free[1 - side]
        if not self.free:
            raise NotThis("")
        self.keys = keys

    def operand(self, side: int) -> Labels:
        """Return the labels of an operand of the product, the left one (0) or the right one."""
        rank = len(shape(self._first.invars[side]))
        found: list[tuple[int, ...]] = [()] * rank
        for label, d in enumerate(self._batch[side]):
            found[d] = self._parts.get(label, (label,))
        for label, d in zip(self._of_free[side], self._free[side], strict=True):
            found[d] = (label,)
        # What is summed over, in the order that queries and keys share.
        for n, d in enumerate(self._contracted[side]):
            found[d] = (-1 - n,)
        return tuple(found)

    def last(self, last: core.JaxprEqn, side: int, labels: Labels) -> tuple[dict[str, Labels], int]:
        """Return the labels of all operands and of the result of `last`, and the width of values."""
        contracted, batch = last.params["dimension_numbers"]
        mine, theirs = (contracted[side], batch[side]), (contracted[1 - side], batch[1 - side])
        if [labels[d] for d in mine[0]] != [(self.keys,)]:
            raise NotThis("")
        if sorted(label for d in mine[1] for label in labels[d]) != sorted(self.batch):
            raise NotThis("its values have other dimensions than its keys")
        width = len(self.sizes)
        of_value: list[tuple[int, ...]] = [(width,)] * len(shape(last.invars[1 - side]))
        for d, other in zip(mine[1], theirs[1], strict=True):
            of_value[other] = labels[d]
        of_value[theirs[0][0]] = (self.keys,)
        if of_value.count((width,)) != 1:
            raise NotThis("its values have several widths")
        rest = [labels[d] for d in range(len(labels)) if d not in (*mine[0], *mine[1])]
        of_width = [(width,), *rest] if side == 1 else [*rest, (width,)]
        place = {
            "query": self.operand(self.query),
            "key": self.operand(1 - self.query),
            "value": tuple(of_value),
            "out": tuple([labels[d] for d in mine[1]] + of_width),
        }
        return place, shape(last.invars[1 - side])[of_value.index((width,))]


def placed_along(first: core.JaxprEqn, steps: Sequence[tuple[core.JaxprEqn, int]]) -> PlacedDims:
    """Return the labels of a product whose results go through `steps`.

    Where these take a dimension apart that both operands have, such as heads that were merged with the
    batch, it has a label for each part. Raises NotThis where they take any other apart.
    """
    cut: dict[int, int] = {}
    while True:
        placed = PlacedDims(first, cut)
        labels = placed.scores
        for eqn, _ in steps:
            try:
                labels = through(eqn, labels, placed.sizes)
            except NotThis:
                found = _cut(labels, placed.sizes, eqn.params["new_sizes"])
                if (
                    found is None
                    or found[0] in cut
                    or found[0] not in placed.batch[: len(placed.batch) - len(cut)]
                ):
                    raise
                cut[found[0]] = found[1]
                break
        else:
            return placed


def _cut(labels: Labels, sizes: Sequence[int], after: Sequence[int]) -> tuple[int, int] | None:
    """Return which label a reshape to `after` takes apart first, and how large its major part is."""
    left = [d for dim in labels for d in dim]
    for size in after:
        taken = 1
        while taken < size and left:
            label = left.pop(0)
            major = size // taken
            if size % taken == 0 and sizes[label] > major and sizes[label] % major == 0:
                return label, major
            taken *= sizes[label]
        if taken != size:
            return None
    return None


def through(eqn: core.JaxprEqn, labels: Labels, sizes: Sequence[int]) -> Labels:
    """Return the labels of the result of `eqn` from those of what goes through it."""
    name = eqn.primitive.name
    if name == "transpose":
        return tuple(labels[d] for d in eqn.params["permutation"])
    if name == "squeeze":
        return tuple(one for n, one in enumerate(labels) if n not in eqn.params["dimensions"])
    if name == "reshape":
        found = regroup(labels, sizes, eqn.params["new_sizes"])
        if found is None:
            raise NotThis("its scores are reshaped through a dimension")
        return found
    return labels
