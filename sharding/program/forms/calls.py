"""Attention that was found, as a call of `ops.attention`: its arrays laid out, its mask as segments or pairs.

A mask that `ops.attention` has no words for is handed to it as it is written, as an array over queries and
keys; so is what is added to scores, and what weights are multiplied by.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from ...ops.biases import BATCH, HEADS, KEYS, QUERIES
from .attention import WrittenAttention
from .biases import FoundBias, placed_bias
from .carried import Call, carried_out
from .masks import Labels, Mask, Part, dtype_of
from .opened import shapes
from .spans import NotThis, Seen, seen_by
from .values import Sources, shape

_LOW = ("bfloat16", "float16")

# A score that exp makes 0 of beside any other, and that is a number by itself.
_HIDDEN = -1e30

_HEADS = "its mask differs from head to head"


class Calls:
    """Makes the programs that attention is replaced by, one for all calls that are alike."""

    def __init__(self, values: Sources) -> None:
        self.values = values
        self._made: dict[Any, core.ClosedJaxpr] = {}

    def of(self, one: WrittenAttention) -> tuple[core.ClosedJaxpr, list[Any]]:
        """Return the program that gives the result of `one`, and the atoms that it reads.

        Raises NotThis if `ops.attention` cannot do it, or not with the same values.
        """
        if one.scores_aval.dtype == np.float64:
            raise NotThis("it is in float64, and scores of attention are worked out in float32")
        with contextlib.suppress(NotThis):
            if (found := self.by_blocks(one)) is not None:
                return found
        try:
            return self._of(one)
        except NotThis as why:
            if str(why).startswith(_HEADS) or not (one.written.pairs or one.written.biases):
                raise
            try:
                return self._of(dataclasses.replace(one, mask=one.written))
            except NotThis:
                raise why from None

    def by_blocks(self, one: WrittenAttention) -> tuple[core.ClosedJaxpr, list[Any]] | None:
        """Return what `of` does if its bias can be worked out by blocks, else None."""
        if not one.mask.biases or (found := self._placed(one)) is None:
            return None
        return self._of(dataclasses.replace(one, mask=_without_biases(one.mask)), found)

    def _placed(self, one: WrittenAttention) -> FoundBias | None:
        """Return the bias as what is worked out by blocks; None if it is another."""
        mask = one.mask
        # A query that sees no key then gets weights of the bias alone.
        if mask.late and self._may_see_nothing(one) and any(added == 0 for added, _ in mask.fills):
            return None
        heads = _heads(one, [*mask.padding, *mask.query_padding])
        batch = tuple(d for d in _by_place(one) if d not in heads)
        wholes = {
            BATCH: batch,
            HEADS: (*heads, *one.groups),
            QUERIES: (one.scores.rows,),
            KEYS: (one.scores.keys,),
        }
        wholes = {role: tuple(d for d in dims if one.sizes[d] > 1) for role, dims in wholes.items()}

        def role(dim: Sequence[int]) -> tuple[str, ...]:
            left, found = tuple(d for d in dim if one.sizes[d] > 1), []
            while left:
                here = (r for r, dims in wholes.items() if dims and left[: len(dims)] == dims)
                found.append(_first(here))
                left = left[len(wholes[found[-1]]) :]
            return tuple(found)

        sizes = {role: math.prod(one.sizes[d] for d in dims) for role, dims in wholes.items()}
        try:
            return placed_bias(self.values, mask.biases, sizes, role)
        except NotThis:
            return None

    def _may_see_nothing(self, one: WrittenAttention) -> bool:
        """Whether a query may see no key, as none does that sees its own place and has that key's segment."""
        mask, place = one.mask, np.arange(one.sizes[one.scores.rows])
        if mask.pairs or mask.padding or mask.query_padding:
            return True
        kinds = {self.values.digest(part.atom) for pair in mask.segments for part in pair}
        sees_own = bool(((mask.seen.low <= place) & (place <= mask.seen.high)).all())
        return len(kinds) > 1 or (bool(kinds) and not sees_own)

    def _of(
        self, one: WrittenAttention, placed: FoundBias | None = None
    ) -> tuple[core.ClosedJaxpr, list[Any]]:
        mask = one.mask
        parts = [*mask.padding, *mask.query_padding]
        atoms, labels, scales = self._operands(one)
        scale = scales[0] * one.scale
        heads = _heads(one, parts)
        seen = seen_by(mask.seen, one.sizes[one.scores.keys])
        sink = () if one.sink is None else (one.sink,)
        factors = one.factors
        if one.blank is not None and (mask.pairs or mask.biases or factors or sink):
            # What hides weights is over scores then, and puts those to 0 of a query that sees nothing.
            factors = (*factors, one.blank)
        pairs = (*mask.pairs, *mask.biases, *factors, *sink)
        others = [*(mask.segments[0] if mask.segments else ()), *parts, *pairs]
        # The gradient of what hides a query's keys by being added reaches the bias of all of them.
        filled = placed is not None and any(added for added, _ in mask.fills) and self._may_see_nothing(one)
        literal = bool(pairs) or filled
        apart = not literal and _apart(self.values, one, seen)
        call = Call(
            arrays=(*labels[:3], *(part.labels for part in others)),
            scaled=tuple((part.labels, part.how == "multiplied") for part in one.scaled),
            further=tuple(
                (labels[n], labels[n + 1], more.by * by / scale)
                for n, more, by in zip(range(3, len(labels), 2), one.further, scales[1:], strict=True)
            ),
            out=one.place["out"],
            sizes=one.sizes,
            batch=tuple(d for d in _by_place(one) if d not in heads),
            heads=heads,
            groups=one.groups,
            rows=one.scores.rows,
            keys=one.scores.keys,
            # A cap is put on scores, and not on what of them it divides.
            scale=scale * (one.cap or 1.0),
            cap=one.cap,
            seen=seen,
            segmented=bool(mask.segments),
            apart=apart,
            padding=tuple(part.how == "false" for part in mask.padding),
            query_padding=tuple(part.how == "false" for part in mask.query_padding),
            unseeing=None if literal else _unseeing(one, apart),
            added=any(added for added, _ in mask.fills),
            dtype=str(dtype_of(one.product.outvars[0])),
            pairs=tuple(part.how == "false" for part in mask.pairs),
            biases=tuple(part.fill for part in mask.biases),
            factors=tuple(None if part.how == "added" else part.how == "false" for part in factors),
            sink=one.sink is not None,
            times=one.times,
            literal=literal,
            blank=one.blank is not None,
            fill=_fill(one) if literal and self._may_see_nothing(one) else None,
            precision=None if dtype_of(atoms[0]).itemsize < 4 else one.precision,
            placed=None if placed is None else placed.bias,
            counted=() if placed is None else placed.counted,
        )
        if call.literal and mask.segments and (len(mask.segments) > 1 or _not_integers(mask.segments[0])):
            raise NotThis("its segments are told by several arrays, or by numbers that are no integers")
        if call.seen.block is not None and call.literal and mask.by_data:
            raise NotThis("it has blocks, and a mask of its own for every query and key")
        of_queries = [part.atom for part in one.scaled]
        inputs = [*atoms[:3], *(part.atom for part in others), *of_queries, *atoms[3:]]
        inputs += () if placed is None else placed.given
        kinds = shapes(inputs)
        key = call, tuple((kind.shape, str(kind.dtype)) for kind in kinds)
        if key not in self._made:
            self._made[key] = jax.make_jaxpr(lambda *arrays: carried_out(call, *arrays))(*kinds)
        return self._made[key], inputs

    def _operands(self, one: WrittenAttention) -> tuple[list[Any], list[Labels], list[float]]:
        """Return query, key and value as they were before heads were repeated or their type was widened.

        After them come queries and keys of further products. The numbers are what each product is scaled by
        for that.
        """
        more = [atom for other in one.further for atom in (other.query, other.key)]
        atoms = [one.query, one.key, one.value, *more]
        labels = [one.place["query"], one.place["key"], one.place["value"]]
        labels += [place for other in one.further for place in (other.of_query, other.of_key)]
        scales = [1.0] * (1 + len(one.further))
        # What asks for products of float32 that are exact gets them, whatever was widened.
        exact = one.precision is not None or (one.scaled and one.scores_aval.dtype.itemsize > 2)
        narrow = None if exact else self._narrow(atoms)
        if narrow is not None:
            by = narrow[1]
            scaled = [by[0] * by[1], *(by[n] * by[n + 1] for n in range(3, len(by), 2))]
            shares = (
                other.by * more / (one.scale * scaled[0])
                for other, more in zip(one.further, scaled[1:], strict=True)
            )
            # Queries of another scale would be rounded once more in a narrow type.
            if all(math.frexp(abs(share))[0] == 0.5 for share in shares):
                atoms, scales = narrow[0], scaled
        if not one.groups:
            atoms[1], atoms[2], labels[1:3] = self._unrepeated(atoms[1], atoms[2], labels[1:3], one)
        return atoms, labels, scales

    def _narrow(self, atoms: Sequence[Any]) -> tuple[list[Any], list[float]] | None:
        """Return the operands in the one type that they were widened from, and what has scaled each since."""
        found, scales = [], []
        for n, atom in enumerate(atoms):
            by = 1.0
            eqn = self.values.made(atom, "mul", "div")
            # A scale between the widening and the product is as well put on the scores.
            number = self.values.number(eqn.invars[1]) if eqn is not None and n != 2 else None
            if eqn is not None and number:
                atom, by = eqn.invars[0], number if eqn.primitive.name == "mul" else 1 / number
            before = self.values.made(atom, "convert_element_type")
            if before is not None:
                atom = before.invars[0]
            elif by != 1.0:
                return None
            found.append(self.values.opening.outside(atom))
            scales.append(by)
        kinds = {str(dtype_of(atom)) for atom in found}
        if len(kinds) != 1 or kinds.isdisjoint(_LOW) or not scales[0] * scales[1] > 0:
            return None
        return found, scales

    def _unrepeated(
        self, key: Any, value: Any, labels: Sequence[Labels], one: WrittenAttention
    ) -> tuple[Any, Any, list[Labels]]:
        of_further = {d for other in one.further for dim in other.of_key for d in dim}
        for head in (head for head in reversed(_by_place(one)) if head not in of_further):
            found = [self._before_repeat(a, b, head) for a, b in zip((key, value), labels, strict=True)]
            if found[0] is not None and found[1] is not None and found[0][2] == found[1][2]:
                return found[0][0], found[1][0], [found[0][1], found[1][1]]
        return key, value, list(labels)

    def _before_repeat(self, atom: Any, labels: Labels, head: int) -> tuple[Any, Labels, int] | None:
        """Return an array before each of its heads was repeated, and how often; None if it was not."""
        while (eqn := self.values.made(atom)) is not None:
            if eqn.primitive.name == "transpose":
                order = list(eqn.params["permutation"])
                labels = tuple(labels[order.index(d)] for d in range(len(order)))
            elif eqn.primitive.name not in ("convert_element_type", "copy", "name"):
                break
            elif eqn.primitive.name == "convert_element_type":
                return None
            atom = eqn.invars[0]
        stretch = None if eqn is None else self.values.made(eqn.invars[0], "broadcast_in_dim")
        if eqn is None or eqn.primitive.name != "reshape" or stretch is None or (head,) not in labels:
            return None
        place = labels.index((head,))
        wide, after = shape(stretch.outvars[0]), shape(atom)
        if wide[:place] != after[:place] or wide[place + 2 :] != after[place + 1 :]:
            return None
        source = self.values.opening.outside(stretch.invars[0])
        where, before = list(stretch.params["broadcast_dimensions"]), shape(source)
        kept = [d for n, d in enumerate(where) if before[n] == wide[d] and d != place + 1]
        others = [d for d in range(len(wide)) if d != place + 1 and (d in kept or wide[d] != 1)]
        if (
            kept != others
            or place not in kept
            or any(before[n] != 1 for n, d in enumerate(where) if d not in kept)
        ):
            return None
        of_wide = [*labels[: place + 1], (), *labels[place + 1 :]]
        return source, tuple(of_wide[d] if d in kept else () for d in where), wide[place + 1]


def _without_biases(mask: Mask) -> Mask:
    """Return what hides keys alone."""
    return dataclasses.replace(mask, biases=[], late=False)


def _first(roles: Iterator[str]) -> str:
    found = next(roles, None)
    if found is None:
        raise NotThis("a dimension of its bias is a part of heads or of the batch")
    return found


def _by_place(one: WrittenAttention) -> list[int]:
    """Return the labels that queries and keys share, in the order in which they stand in queries."""
    order = [label for dim in one.place["query"] for label in dim]
    return [label for label in order if label in one.scores.batch]


def _heads(one: WrittenAttention, parts: Sequence[Part]) -> tuple[int, ...]:
    """Return the label of the heads of keys: the last that queries and keys share and that no mask has."""
    shared = _by_place(one)
    of_masks = {d for pair in one.mask.segments for part in pair for d in part.has()}
    of_masks.update(d for part in parts for d in part.has())
    free = [d for d in shared if d not in of_masks]
    if not free and len(shared) > 1 and of_masks:
        raise NotThis(_HEADS)
    return tuple(free[-1:]) if len(shared) > 1 else ()


def _unseeing(one: WrittenAttention, apart: bool) -> float | None:
    """Return what hidden scores become, if queries may see nothing; None if each sees a key."""
    mask = one.mask
    if not (mask.padding or mask.query_padding or apart):
        return None
    if one.blank is not None and len(mask.fills) == 1:
        return 0.0
    if mask.unseen is None or one.blank is not None:
        raise NotThis("a query may see no key, and what it gets then is not the mean of all")
    if one.cap is not None and any(added for added, _ in mask.fills):
        raise NotThis("a query may see no key, and a cap shapes its gradient then")
    return mask.unseen


def _apart(values: Sources, one: WrittenAttention, seen: Seen) -> bool:
    """Return whether ids of queries have to differ from those of keys, and tell who sees a key at all.

    They need not where one array has both and a query that sees nothing is padding itself.

    Raises NotThis where segments, or segments and padding, cannot be told by ids.
    """
    mask = one.mask
    if not mask.segments:
        if (mask.padding or mask.query_padding) and seen.block is not None:
            raise NotThis("it has blocks and padding at once")
        return False
    if seen.block is not None or seen.first is not None:
        raise NotThis("it has segments and blocks at once")
    if _not_integers(mask.segments[0]):
        raise NotThis("its segments are told by numbers that are no integers")
    kinds = {values.digest(part.atom) for pair in mask.segments for part in pair}
    alike = one.sizes[one.scores.rows] == one.sizes[one.scores.keys]
    if len(kinds) == 1 and alike:
        if not (mask.padding or mask.query_padding) or _of_padding(values, mask, kinds):
            return False
    elif len(mask.segments) > 1:
        raise NotThis("its segments are told by several arrays")
    elif seen != Seen(last=seen.last) and not alike:
        raise NotThis("it is hidden by place, and has segments of another number of keys than queries")
    if seen.prefix:
        raise NotThis("it has segments, padding and a prefix at once, and a query may see no key")
    return True


def _of_padding(values: Sources, mask: Mask, kinds: set[int]) -> bool:
    """Whether padding is that of queries too, so that a query that sees nothing is padding itself."""
    keys, queries = (
        {(values.digest(part.atom), part.how) for part in parts}
        for parts in (mask.padding, mask.query_padding)
    )
    told = all(_told_by(values, part, kinds) for part in mask.padding)
    return bool(keys) and (told or keys == queries)


def _not_integers(pair: tuple[Part, Part]) -> bool:
    return not all(np.issubdtype(part.atom.aval.dtype, np.integer) for part in pair)


def _fill(one: WrittenAttention) -> float | None:
    """Return what makes hidden scores what they are, where queries may see nothing, else None."""
    mask = one.mask
    if not mask.by_data:
        return None
    if mask.fill is None:
        raise NotThis("a query may see no key, and its scores are hidden in several ways")
    fill, added = mask.fill
    if one.blank is not None:
        # Weights of all keys alike, which are put to 0.
        return max(fill, _HIDDEN)
    if mask.late and not added:
        raise NotThis("a query may see no key, and something is added to its scores after they were hidden")
    if one.cap is not None and added:
        raise NotThis("a query may see no key, and a cap shapes its gradient then")
    return fill


def _told_by(values: Sources, part: Part, kinds: set[int]) -> bool:
    """Whether a condition compares the segments themselves with a number."""
    eqn = values.made(part.atom, "eq", "ne", "gt", "ge", "lt", "le")
    if eqn is None:
        return False
    return values.number(eqn.invars[1]) is not None and values.digest(values.plain(eqn.invars[0])) in kinds
