"""Attention in a traced program, as people write it.

From each exp of a softmax, back through scale, cap, bias and mask to the product of queries and keys, forward
to the product with values. Dimensions are followed as labels, one for each dimension of the scores, so that
orders of dimensions, transposes and grouped heads are no cases of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from .masks import NEVER, Labels, Mask, Masks, Part, Scores, regroup
from .opened import Opened
from .spans import NotThis
from .values import SAME, Sources, shape

# How many equations lie at most between a product and the softmax of its results, and on to the next product.
_FAR = 24

# Tells what is added to scores in one go from what is added in another.
_NUMBERS = itertools.count(1)

_RANDOM = ("random", "threefry", "philox", "rng")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WrittenAttention:
    """One attention: softmax over keys of scale · query · key, capped and masked, times value.

    Labels number the dimensions of the scores and, last, the width of values; those of an operand are in
    `place`, negative for what is summed over in the scores. `sizes` are by label. `groups` are the dimensions
    of queries that read the same keys. `product` in `scope` gives the result, of labels ``place["out"]``.
    """

    product: core.JaxprEqn
    scope: Opened
    query: Any
    key: Any
    value: Any
    place: dict[str, Labels]
    scores: Scores
    groups: tuple[int, ...]
    sizes: tuple[int, ...]
    scale: float
    cap: float | None
    mask: Mask
    scores_aval: Any


@dataclasses.dataclass(kw_only=True, eq=False)
class _Scoring:
    """What happens to scores on the way from the product to the softmax."""

    scale: float = 1.0
    cap: float | None = None
    parts: list[Part] = dataclasses.field(default_factory=list)


class AttentionFinder:
    """Finds attention; `missed` are, after a search, equations that are nearly that, and why not."""

    def __init__(self, values: Sources) -> None:
        self.values = values
        self.masks = Masks(values)
        self.missed: list[tuple[core.JaxprEqn, Any, str]] = []
        self._users: dict[Any, list[core.JaxprEqn]] = {}
        self._results: set[Any] = set()
        self._back: dict[Any, tuple[core.JaxprEqn, tuple[tuple[core.JaxprEqn, int], ...]] | None] = {}

    def search(self) -> list[WrittenAttention]:
        """Return every attention of the program, bodies included."""
        found = []
        for scope in self.values.opening.top.scopes():
            equations = live(scope)
            self._results.update(atom for atom in scope.outvars if not isinstance(atom, core.Literal))
            for eqn in equations:
                for atom in {atom for atom in eqn.invars if not isinstance(atom, core.Literal)}:
                    self._users.setdefault(atom, []).append(eqn)
            for eqn in equations:
                if eqn.primitive.name == "exp" and (one := self._read(eqn, scope)) is not None:
                    found.append(one)
        return found

    def _read(self, exp: core.JaxprEqn, scope: Opened) -> WrittenAttention | None:
        softmax = self._softmax(exp)
        before = None if softmax is None else self._product_before(softmax[1], _FAR)
        after = None if softmax is None else self._product_after(softmax[2], _FAR // 2)
        if softmax is None or before is None or after is None:
            return None
        try:
            return self._attention(softmax, before, after, scope)
        except NotThis as why:
            if str(why):
                self.missed.append((after[1], before[0].outvars[0].aval, str(why)))
            return None

    def _softmax(self, exp: core.JaxprEqn) -> tuple[int, Any, Any] | None:
        """Return a softmax around `exp`: the dimension it is over, what it is of, and its result."""
        less = self.values.made(exp.invars[0], "sub")
        logits = less.invars[0] if less is not None else exp.invars[0]
        numerator = exp.outvars[0]
        for eqn in self._uses(numerator):
            if eqn.primitive.name != "div" or self.values.plain(eqn.invars[0]) is not numerator:
                continue
            found = self._sums(eqn.invars[1], numerator, 12)
            dimensions = range(len(shape(numerator)))
            if found is None or any(found[d] not in (d, None) for d in dimensions):
                continue
            axes = [d for d in dimensions if found[d] is None and shape(numerator)[d] > 1]
            if len(axes) != 1 or self._reduced != (axes[0],):
                continue
            # What is subtracted of all scores of a query alike changes nothing but the range of numbers.
            if less is not None and not self._alike_along(less.invars[1], axes[0]):
                continue
            return axes[0], logits, eqn.outvars[0]
        return None

    def _sums(self, atom: Any, of: Any, depth: int) -> list[int | None] | None:
        """Return, for each dimension of sums of `of`, which of its dimensions it is; None if it is no sum.

        `_reduced` is then what was summed over.
        """
        atom = self.values.plain(atom)
        if atom is of:
            self._reduced: tuple[int, ...] = ()
            return list(range(len(shape(of))))
        eqn = self.values.made(atom)
        if eqn is None or depth == 0 or len(eqn.invars) != 1:
            return None
        before = self._sums(eqn.invars[0], of, depth - 1)
        if before is None:
            return None
        name = eqn.primitive.name
        if name == "reduce_sum" and not self._reduced:
            axes = tuple(int(axis) for axis in eqn.params["axes"])
            self._reduced = tuple(before[axis] for axis in axes)  # pyright: ignore[reportAttributeAccessIssue]
            return [one for n, one in enumerate(before) if n not in axes]
        if name == "transpose":
            return [before[d] for d in eqn.params["permutation"]]
        if name == "broadcast_in_dim":
            where = list(eqn.params["broadcast_dimensions"])
            return [before[where.index(d)] if d in where else None for d in range(len(eqn.params["shape"]))]
        if name in ("reshape", "squeeze"):
            sizes = shape(eqn.invars[0])
            rest = iter([one for one, size in zip(before, sizes, strict=True) if size > 1])
            after = shape(atom)
            if [size for size in sizes if size > 1] == [size for size in after if size > 1]:
                return [next(rest) if size > 1 else None for size in after]
        return None

    def _alike_along(self, atom: Any, axis: int) -> bool:
        """Whether an array has one number along a dimension."""
        atom = self.values.plain(atom)
        if not shape(atom) or shape(atom)[axis] == 1:
            return True
        eqn = self.values.made(atom, "broadcast_in_dim")
        if eqn is None:
            return False
        where = list(eqn.params["broadcast_dimensions"])
        return axis not in where or shape(eqn.invars[0])[where.index(axis)] == 1

    def _uses(self, atom: Any) -> list[core.JaxprEqn]:
        """Return what reads `atom`, through changes of type and name."""
        found = []
        for eqn in self._users.get(atom, ()):
            found += self._uses(eqn.outvars[0]) if eqn.primitive.name in SAME else [eqn]
        return found

    def _product_before(
        self, atom: Any, depth: int
    ) -> tuple[core.JaxprEqn, tuple[tuple[core.JaxprEqn, int], ...]] | None:
        """Return the product that logits come from, and the steps from there: equations and which operand."""
        eqn = self.values.made(atom)
        if eqn is None or depth == 0 or len(eqn.invars) > 3:
            return None
        name = eqn.primitive.name
        if name == "dot_general":
            return eqn, ()
        key = eqn.outvars[0]
        if key not in self._back:
            self._back[key] = None
            for n in _BACK.get(name, (0,) if name in SAME else ()):
                found = self._product_before(eqn.invars[n], depth - 1)
                if found is not None:
                    self._back[key] = found[0], (*found[1], (eqn, n))
                    break
        return self._back[key]

    def _product_after(
        self, atom: Any, depth: int
    ) -> tuple[tuple[tuple[core.JaxprEqn, int], ...], core.JaxprEqn, int] | None:
        """Return the steps from weights to the product that reads them, it, and which operand they are."""
        for eqn in self._users.get(atom, ()) if depth else ():
            n = next(n for n, one in enumerate(eqn.invars) if one is atom)
            if eqn.primitive.name == "dot_general":
                return (), eqn, n
            if eqn.primitive.name in ("transpose", "reshape", "mul", "div", "select_n", *SAME):
                found = self._product_after(eqn.outvars[0], depth - 1)
                if found is not None:
                    return ((eqn, n), *found[0]), *found[1:]
        return None

    def _attention(
        self,
        softmax: tuple[int, Any, Any],
        before: tuple[core.JaxprEqn, tuple[tuple[core.JaxprEqn, int], ...]],
        after: tuple[tuple[tuple[core.JaxprEqn, int], ...], core.JaxprEqn, int],
        scope: Opened,
    ) -> WrittenAttention:
        (axis, _, weights), (first, steps), (steps_after, last, side) = softmax, before, after
        _check_precision(first)
        _check_precision(last)
        placed = _Placed(first)
        labels: Labels = tuple((d,) for d in range(len(placed.sizes)))
        scoring = _Scoring()
        for eqn, main in steps:
            self._step(eqn, main, labels, scoring)
            labels = through(eqn, labels, placed.sizes)
        if len(labels[axis]) != 1:
            raise NotThis("")
        keys = labels[axis][0]
        placed.tell(keys)
        self._check_weights(weights, steps_after, last)
        for eqn, _ in steps_after:
            labels = through(eqn, labels, placed.sizes)
        place, width = placed.last(last, side, labels)
        rows = self._rows(placed, scoring.parts)
        scores = Scores(sizes=placed.sizes, batch=placed.batch, rows=rows, keys=keys)
        return WrittenAttention(
            product=last,
            scope=scope,
            query=first.invars[placed.query],
            key=first.invars[1 - placed.query],
            value=last.invars[1 - side],
            place=place,
            scores=scores,
            groups=tuple(d for d in placed.free if d != rows),
            sizes=(*placed.sizes, width),
            scale=scoring.scale,
            cap=scoring.cap,
            mask=self.masks.read(scoring.parts, scores),
            scores_aval=first.outvars[0].aval,
        )

    def _rows(self, placed: _Placed, parts: Sequence[Part]) -> int:
        """Return which dimension of queries is their sequence: what masks have; without, the longest."""
        leaves = [leaf for part in parts for leaf in self.masks.leaves(part, placed.sizes)]
        known = [d for d in placed.free if any(d in leaf.has() for leaf in leaves)]
        # Of equal ones the last: groups of heads stand before their sequence.
        return known[-1] if len(known) == 1 else max(known or placed.free, key=lambda d: (placed.sizes[d], d))

    def _step(self, eqn: core.JaxprEqn, main: int, labels: Labels, scoring: _Scoring) -> None:
        """Take note of what `eqn` does to scores, which are its operand `main`."""
        name = eqn.primitive.name
        others = [atom for n, atom in enumerate(eqn.invars) if n != main]
        if name in ("mul", "div"):
            by = self.values.number(others[0])
            if by is None or not by > 0 or (name == "div" and main == 1):
                raise NotThis("its scores are multiplied by an array")
            by = 1 / by if name == "div" else by
            if scoring.cap is not None:
                if scoring.parts:
                    raise NotThis("its scores are scaled after a mask")
                scoring.cap *= by
            elif any(part.added for part in scoring.parts):
                raise NotThis("its scores are scaled after something was added")
            else:
                scoring.scale *= by
                # A hidden score is scaled too.
                scoring.parts = [dataclasses.replace(p, fill=p.fill * by) for p in scoring.parts]
        elif name == "tanh":
            if scoring.cap is not None or scoring.parts:
                raise NotThis("its scores are capped twice, or after a mask")
            scoring.cap = 1.0
        elif name in ("add", "sub"):
            here = labels if shape(others[0]) else ()
            by = 1.0 if name == "add" else -1.0
            added = next(_NUMBERS)
            scoring.parts.append(Part(atom=others[0], labels=here, how="added", fill=by, added=added))
        elif name == "select_n":
            fill = self.values.number(eqn.invars[3 - main])
            if fill is None or not fill <= NEVER:
                raise NotThis("its scores are replaced by others")
            how = "false" if main == 2 else "true"
            here = labels if shape(eqn.invars[0]) else ()
            scoring.parts.append(Part(atom=eqn.invars[0], labels=here, how=how, fill=fill))

    def _check_weights(
        self, weights: Any, steps: Sequence[tuple[core.JaxprEqn, int]], last: core.JaxprEqn
    ) -> None:
        """Raise NotThis if weights are changed on the way to the values, or read by anything else."""
        changes = [step for step in steps if step[0].primitive.name in ("mul", "div", "select_n")]
        others = [atom for eqn, main in changes for n, atom in enumerate(eqn.invars) if n != main]
        if any(self._random(atom, 40) for atom in others):
            raise NotThis("its weights are dropped at random")
        if changes:
            raise NotThis("its weights are changed before the values are summed")
        on_the_way = [weights, *(eqn.outvars[0] for eqn, _ in steps)]
        readers = [*(eqn for eqn, _ in steps), last]
        for atom, reader in zip(on_the_way, readers, strict=True):
            if atom in self._results or any(eqn is not reader for eqn in self._users.get(atom, ())):
                raise NotThis("its weights are read by more than the sum of values")

    def _random(self, atom: Any, depth: int) -> bool:
        eqn = self.values.made(atom)
        if eqn is None or depth == 0:
            return False
        if any(word in eqn.primitive.name for word in _RANDOM):
            return True
        return any(self._random(one, depth - 1) for one in eqn.invars)


class _Placed:
    """Labels of what is multiplied: which dimensions of scores each dimension of an operand is."""

    def __init__(self, first: core.JaxprEqn) -> None:
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
        self.query = 0
        self.free: tuple[int, ...] = ()

    def tell(self, keys: int) -> None:
        """Take note of which label is the keys', and with it which operand they are."""
        side = 0 if keys in self._of_free[0] else 1
        if self._of_free[side] != (keys,):
            raise NotThis("")
        self.query, self.free = 1 - side, self._of_free[1 - side]
        if not self.free:
            raise NotThis("")
        self.keys = keys

    def _operand(self, side: int) -> Labels:
        rank = len(shape(self._first.invars[side]))
        found: list[tuple[int, ...]] = [()] * rank
        for label, d in zip(self.batch, self._batch[side], strict=True):
            found[d] = (label,)
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
        if sorted(label for d in mine[1] for label in labels[d]) != list(self.batch):
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
            "query": self._operand(self.query),
            "key": self._operand(1 - self.query),
            "value": tuple(of_value),
            "out": tuple([labels[d] for d in mine[1]] + of_width),
        }
        return place, shape(last.invars[1 - side])[of_value.index((width,))]


# Through which operands scores may have come.
_BACK = {
    "mul": (0, 1),
    "div": (0,),
    "add": (0, 1),
    "sub": (0,),
    "select_n": (1, 2),
    "tanh": (0,),
    "transpose": (0,),
    "reshape": (0,),
    "squeeze": (0,),
}


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


def live(scope: Opened) -> list[core.JaxprEqn]:
    """Return the equations of a scope that its results depend on."""
    needed = {atom for atom in scope.outvars if not isinstance(atom, core.Literal)}
    kept = []
    for eqn in reversed(scope.equations):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
    return kept[::-1]


def _check_precision(product: core.JaxprEqn) -> None:
    asked = product.params["precision"]
    for one in asked if isinstance(asked, tuple) else (asked,):
        # Of half precision, what is multiplied as it is and summed in float32 is what is always done.
        if one is not None and "DEFAULT" not in str(one) and not str(one).endswith("16_F32"):
            raise NotThis(f"its products ask for precision {one}")
