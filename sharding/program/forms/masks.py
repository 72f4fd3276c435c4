"""Masks of attention, taken apart into what hides keys from queries: places, segments, padding.

A mask is taken apart where it says "and", a bias where it says "add". What depends on places only is proved
(`spans`); the rest is read by its structure: one array at a query equal to another at a key is segments, a
truth value of each key is padding. What is left is an array of its own for every query and key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..pointwise import SAME, Untold
from .spans import KEY, ROW, NotThis, Spans, all_of, spans
from .values import Sources, moved, shape

# Of each dimension of an array: which dimensions of the scores it is, major to minor; none for size 1.
Labels = tuple[tuple[int, ...], ...]

# A number that is added to a score and is at most this hides a key: exp of it is 0 beside any real score.
NEVER = -1e4
# How many equations lie at most between a product and what is added to scores of it.
_NEAR = 6
# At most this, what it is added to is lost in float32, and scores that are hidden become alike.
_LOST = -1e9


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One condition of a mask, and which dimensions of the scores it has.

    `how` is what hides a key: the truth value being ``false`` or ``true``, or a number that is ``added``.
    `fill` is what a hidden score becomes, or what is added to it; of a number that is ``added``, what it is
    multiplied by before that. `added` numbers the additions, and is 0 where scores are replaced.
    """

    atom: Any
    labels: Labels
    how: str
    fill: float
    added: int = 0

    def has(self) -> set[int]:
        """Return the dimensions of the scores that it has."""
        return {d for dim in self.labels for d in dim}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The dimensions of scores, by their numbers: several of the batch, those of queries, that of keys."""

    sizes: tuple[int, ...]
    batch: tuple[int, ...]
    rows: int
    keys: int


@dataclasses.dataclass(kw_only=True, eq=False)
class Mask:
    """What hides keys from queries.

    seen: by places alone.
    segments: pairs of an array of queries and one of keys; a key is seen where they are equal.
    padding: conditions of keys alone, of which each must hold; `query_padding` of queries alone.
    pairs: conditions of queries and keys of any other kind.
    biases: what is added to scores.
    late: whether something is added to scores that were replaced before.
    """

    seen: Spans
    segments: list[tuple[Part, Part]] = dataclasses.field(default_factory=list)
    padding: list[Part] = dataclasses.field(default_factory=list)
    query_padding: list[Part] = dataclasses.field(default_factory=list)
    pairs: list[Part] = dataclasses.field(default_factory=list)
    biases: list[Part] = dataclasses.field(default_factory=list)
    fills: set[tuple[int, float]] = dataclasses.field(default_factory=set)
    late: bool = False

    @property
    def by_data(self) -> bool:
        """Whether anything but places hides keys, so that a query may see none."""
        return bool(self.segments or self.padding or self.query_padding or self.pairs)

    @property
    def fill(self) -> tuple[float, bool] | None:
        """What hides scores, and whether it is added to them; None if that is not one number."""
        if len(self.fills) != 1:
            return None
        ((added, number),) = self.fills
        return None if math.isnan(number) else (number, added > 0)

    @property
    def unseen(self) -> float | None:
        """What every score of a query becomes that sees nothing; None if that is not one number."""
        additions = {added for added, _ in self.fills}
        numbers = {fill for _, fill in self.fills}
        if len(numbers) != 1 or len(additions) != 1:
            return None
        (number,) = numbers
        return number if additions == {0} or number <= _LOST else None


class Masks:
    """Reads masks of a program."""

    def __init__(self, values: Sources) -> None:
        self.values = values
        self._known: dict[Any, Spans | None] = {}

    def read(self, parts: Sequence[Part], scores: Scores, *, apart: bool = True) -> Mask:
        """Return what `parts` hide and add; without `apart`, each as it is written. Raises NotThis."""
        mask = Mask(seen=all_of(scores.sizes[scores.rows], scores.sizes[scores.keys]))
        for part in parts:
            for leaf in self.leaves(part, scores.sizes) if apart else [self.stripped(part, scores.sizes)]:
                self._take(mask, leaf, scores, apart)
        return mask

    def _take(self, mask: Mask, part: Part, scores: Scores, apart: bool) -> None:
        static = self._static(part, scores) if apart else None
        if part.how == "added" and static is None:
            whole = {scores.rows, scores.keys, *scores.batch}
            if whole <= part.has() and self._of_products(part, scores, _NEAR):
                raise NotThis("its scores are of two products")
            mask.biases.append(part)
            mask.late |= any(added == 0 for added, _ in mask.fills)
            return
        mask.fills.add((part.added, math.nan if part.how == "added" else part.fill))
        if static is not None:
            mask.seen = mask.seen.within(static)
        elif apart and (ids := self._segments(part, scores)) is not None:
            mask.segments.append(ids)
        elif apart and part.has() <= {scores.keys, *scores.batch}:
            mask.padding.append(part)
        elif apart and part.has() <= {scores.rows, *scores.batch}:
            mask.query_padding.append(part)
        else:
            mask.pairs.append(part)

    def _of_products(self, part: Part, scores: Scores, depth: int) -> bool:
        """Whether an array is a product of queries and of keys, laid out and scaled."""
        part = self.stripped(part, scores.sizes)
        eqn = self.values.made(part.atom)
        if eqn is None or depth == 0:
            return False
        if eqn.primitive.name == "dot_general":
            return len(shape(part.atom)) >= 3 and _is_of_scores(eqn, part.labels, scores)
        alike = (one for one in eqn.invars if shape(one) == shape(part.atom))
        return eqn.primitive.name in ("mul", "div", "select_n") and any(
            self._of_products(dataclasses.replace(part, atom=one), scores, depth - 1) for one in alike
        )

    def _static(self, part: Part, scores: Scores) -> Spans | None:
        """Return what a condition on places lets through, None if it depends on anything else."""
        where = {(scores.rows,): ROW, (scores.keys,): KEY, (): 0}
        at = [where.get(dim) for dim in part.labels]
        sizes = scores.sizes[scores.rows], scores.sizes[scores.keys]
        key = (self.values.digest(part.atom), tuple(at), sizes, part.how, part.fill)
        if key not in self._known:
            try:
                found = spans(self.values, part.atom, at, sizes, lambda x: _lets_through(part, x))
            except (Untold, TypeError, ValueError, IndexError):
                self._known[key] = None
            else:
                self._known[key] = found
        return self._known[key]

    def _segments(self, part: Part, scores: Scores) -> tuple[Part, Part] | None:
        """Return the conditions that `part` compares, that of queries first, None if it is no such thing."""
        eqn = self.values.made(part.atom, "eq")
        if eqn is None or part.how != "false":
            return None
        first, second = (
            self.stripped(Part(atom=one, labels=labels_of(one, part), how="added", fill=0.0), scores.sizes)
            for one in eqn.invars
        )
        batch = set(scores.batch)
        has = [first.has() - batch, second.has() - batch]
        if has == [{scores.keys}, {scores.rows}]:
            return second, first
        return (first, second) if has == [{scores.rows}, {scores.keys}] else None

    def leaves(self, part: Part, sizes: Sequence[int]) -> list[Part]:
        """Return the conditions that a mask or a bias consists of."""
        part = self.stripped(part, sizes)
        eqn = self.values.made(part.atom)
        if eqn is None:
            return [part]
        found = self._added(eqn, part) if part.how == "added" else self._logical(eqn, part)
        return [part] if found is None else [leaf for one in found for leaf in self.leaves(one, sizes)]

    def _logical(self, eqn: core.JaxprEqn, part: Part) -> list[Part] | None:
        name, inputs = eqn.primitive.name, eqn.invars
        boolean = is_truth(part.atom)

        def one(atom: Any, how: str = part.how) -> Part:
            return dataclasses.replace(part, atom=atom, labels=labels_of(atom, part), how=how)

        other = "true" if part.how == "false" else "false"
        if name == "not" and boolean:
            return [one(inputs[0], other)]
        if name in ("ne", "gt") and self.values.number(inputs[1]) == 0 and self._binary(inputs[0]):
            return [one(inputs[0])]
        if part.how == "true":
            return [one(x) for x in inputs] if name == "or" and boolean else None
        if (name == "and" and boolean) or (name == "mul" and all(self._binary(x) for x in inputs)):
            return [one(x) for x in inputs]
        if name == "select_n" and boolean and len(inputs) == 3:
            if self.values.number(inputs[1]) == 0:
                return [one(inputs[0]), one(inputs[2])]
            if self.values.number(inputs[2]) == 0:
                return [one(inputs[0], other), one(inputs[1])]
        return None

    def _added(self, eqn: core.JaxprEqn, part: Part) -> list[Part] | None:
        name, inputs = eqn.primitive.name, eqn.invars

        def one(atom: Any, how: str, fill: float, added: int = part.added) -> Part:
            return Part(atom=atom, labels=labels_of(atom, part), how=how, fill=fill, added=added)

        if name in ("add", "sub"):
            signs = (1.0, 1.0 if name == "add" else -1.0)
            # Of several additions each hides more of what the others have hidden.
            return [
                one(x, "added", part.fill * sign, part.added * 1000 + n)
                for n, (x, sign) in enumerate(zip(inputs, signs, strict=True))
            ]
        if name == "neg":
            return [one(inputs[0], "added", -part.fill)]
        if name == "select_n" and len(inputs) == 3:
            no, yes = (self._number(x, part.fill) for x in inputs[1:])
            if yes == 0 and no <= NEVER:
                return [one(inputs[0], "false", no)]
            if no == 0 and yes <= NEVER:
                return [one(inputs[0], "true", yes)]
        if name == "mul":
            for x, number in (inputs, inputs[::-1]):
                by, less = self._number(number, part.fill), self.values.made(x, "sub")
                if not by <= NEVER:
                    continue
                if less is not None and self.values.number(less.invars[0]) == 1:
                    if self._binary(less.invars[1]):
                        return [one(less.invars[1], "false", by)]
                elif self._binary(x):
                    return [one(x, "true", by)]
        return None

    def _number(self, atom: Any, times: float) -> float:
        """Return the one number that `atom` holds, multiplied; not a number if it holds several."""
        found = self.values.number(atom)
        return math.nan if found is None else found * times

    def _binary(self, atom: Any) -> bool:
        """Whether an array has no numbers but 0 and 1."""
        eqn = self.values.made(atom)
        if is_truth(atom):
            return True
        if eqn is None:
            return isinstance(atom, core.Literal) and np.asarray(atom.val).item() in (0, 1)
        name = eqn.primitive.name
        if name == "sub":
            return self.values.number(eqn.invars[0]) == 1 and self._binary(eqn.invars[1])
        if name in ("mul", "select_n", "min", "max"):
            return all(self._binary(x) for x in eqn.invars[1 if name == "select_n" else 0 :])
        return name in (*SAME, "broadcast_in_dim", "reshape", "transpose", "squeeze") and self._binary(
            eqn.invars[0]
        )

    def stripped(self, part: Part, sizes: Sequence[int]) -> Part:
        """Return a condition before it was laid out over further dimensions, or in another type."""
        atom, labels = self.values.opening.outside(part.atom), part.labels
        while (eqn := self.values.made(atom)) is not None:
            name = eqn.primitive.name
            if name in ("broadcast_in_dim", "transpose", "squeeze"):
                found = moved(eqn, labels, ())
                assert found is not None
                before = shape(eqn.invars[0])
                labels = tuple(() if size == 1 else one for size, one in zip(before, found, strict=True))
            elif name == "reshape":
                regrouped = regroup(labels, sizes, shape(eqn.invars[0]))
                if regrouped is None:
                    break
                labels = regrouped
            elif (
                name == "convert_element_type" and part.how != "added" and not self._binary(eqn.invars[0])
            ) or name not in SAME:
                break
            atom = self.values.opening.outside(eqn.invars[0])
        return dataclasses.replace(part, atom=atom, labels=labels)


def labels_of(atom: Any, part: Part) -> Labels:
    """Return the labels of an operand of what makes `part`: the same, or none for a scalar."""
    return part.labels if len(shape(atom)) == len(part.labels) else ()


def _is_of_scores(eqn: core.JaxprEqn, labels: Labels, scores: Scores) -> bool:
    """Whether a product sums over what one operand has of queries and the other of keys."""
    (summed, _), (batch, _) = eqn.params["dimension_numbers"]
    first = len(shape(eqn.invars[0])) - len(summed)
    sides = [{d for dim in dims for d in dim} for dims in (labels[len(batch) : first], labels[first:])]
    return bool(summed) and any(
        scores.rows in one and scores.keys in other for one, other in (sides, sides[::-1])
    )


def is_truth(atom: Any) -> bool:
    """Whether an atom holds truth values."""
    return dtype_of(atom) == jnp.bool_


def dtype_of(atom: Any) -> Any:
    """Return the type of an atom."""
    return getattr(atom.aval, "dtype", None)


def _lets_through(part: Part, numbers: Any) -> Any:
    if part.how == "added":
        numbers = np.asarray(numbers) * part.fill
        if not ((numbers == 0) | (numbers <= NEVER)).all():
            raise Untold
        return numbers == 0
    return (numbers != 0) == (part.how == "false")


def regroup(labels: Labels, sizes: Sequence[int], after: Sequence[int]) -> Labels | None:
    """Return the labels of a reshape to `after`, None if a dimension would be cut."""
    left = [d for dim in labels for d in dim]
    found: list[tuple[int, ...]] = []
    for size in after:
        taken: list[int] = []
        while math.prod(sizes[d] for d in taken) < size:
            if not left:
                return None
            taken.append(left.pop(0))
        if math.prod(sizes[d] for d in taken) != size:
            return None
        found.append(tuple(taken))
    return tuple(found) if all(sizes[d] == 1 for d in left) else None
