"""Losses over a whole vocabulary in a traced program, to be worked through some positions at a time.

From a product whose results have a dimension of the vocabulary, to where nothing has it any more: all between
that treats each position by itself is one region, however it is written, and what leaves it is small. The
region is run again for every n-th position in a checkpointed loop, so that logits of a part of the positions
exist at a time, forward and backward.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from ..primitives import Trait, primitives
from .attention import live
from .opened import Opened
from .spans import NotThis
from .values import moved, shape

# Numbers of logits that a whole batch may have at once, and one row of it may have in a chunk: 1/4 GiB.
WHOLE_BATCH = 1 << 26
ROW_CHUNK = 1 << 26
# In a loop, up to so many times a chunk are left: somebody has chosen them already.
_CHOSEN = 8

# Chunks of positions that are not told apart into rows and a sequence.
_CHUNKS = 16

# Dimensions of values of a region: the vocabulary, the positions that are divided, other positions, all of
# these laid end to end, no such.
VOCABULARY, DIVIDED, OTHER, MERGED, NEITHER = "vocabulary", "divided", "other", "merged", "neither"
POSITIONS = (DIVIDED, OTHER, MERGED)
Kinds = tuple[str, ...]

_POINTWISE = primitives(Trait.ELEMENTWISE) | {"copy"}
_REDUCED = frozenset(
    ["reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin"]
)


@dataclasses.dataclass(kw_only=True, eq=False)
class Region:
    """A part of a scope's equations, in order, and how its values lie.

    `inputs` are read and not made in it, `outputs` are made in it and read outside, `kinds` are of all
    these and of what is between. `cut` are the positions that are kept where they are sliced, of `length`.
    """

    scope: Opened
    product: core.JaxprEqn
    equations: list[core.JaxprEqn]
    inputs: list[Any]
    outputs: list[Any]
    kinds: dict[Any, Kinds]
    length: int
    cut: tuple[int, int]
    depending: set[int]


def product_with_vocabulary(eqn: core.JaxprEqn) -> int | None:
    """Return which operand of a product has the vocabulary, if its results may be logits and are many."""
    if eqn.primitive.name != "dot_general" or math.prod(shape(eqn.outvars[0])) <= WHOLE_BATCH:
        return None
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    free = [len(shape(atom)) - len(one) for atom, one in zip(eqn.invars, (left, right), strict=True)]
    if len(batch) or 1 not in free or max(free) < 1:
        return None
    return 1 if free[1] == 1 else 0


class RegionFinder:
    """Finds regions of losses; `missed` are products whose region is none, and why."""

    def __init__(self) -> None:
        self.missed: list[tuple[core.JaxprEqn, Any, str]] = []

    def search(self, scope: Opened) -> list[Region]:
        """Return the regions of one scope."""
        equations = live(scope)
        found = []
        for n, eqn in enumerate(equations):
            side = product_with_vocabulary(eqn)
            if side is None:
                continue
            reading = _Reading(scope, eqn, side, equations[n + 1 :])
            if _in_a_loop(scope) and reading.of_a_row <= _CHOSEN * ROW_CHUNK:
                continue
            try:
                found.append(reading.region())
            except NotThis as why:
                if reading.normalised:
                    self.missed.append((eqn, eqn.outvars[0].aval, str(why)))
        return found


class _Reading:
    def __init__(
        self, scope: Opened, product: core.JaxprEqn, side: int, after: Sequence[core.JaxprEqn]
    ) -> None:
        self._scope, self._product, self._after = scope, product, after
        rank = len(shape(product.outvars[0]))
        rows = (OTHER,) * (rank - 2) + (DIVIDED,)
        self._sizes = shape(product.outvars[0])
        of_out = (*rows, VOCABULARY) if side == 1 else (VOCABULARY, *rows)
        self.length = self._sizes[of_out.index(DIVIDED)]
        self._vocabulary = self._sizes[of_out.index(VOCABULARY)]
        self.kinds: dict[Any, Kinds] = {product.outvars[0]: of_out}
        self.cut: tuple[int, int] | None = None
        # Whether exponentials are summed over the vocabulary, as in losses and not in other products.
        self.normalised = self._exponential = False
        self._depending: set[Any] = {product.outvars[0]}
        self._depending_eqns: set[int] = set()
        contracted = product.params["dimension_numbers"][0][1 - side]
        rest = iter(rows)
        hidden = product.invars[1 - side]
        of_hidden = [NEITHER if d in contracted else next(rest) for d in range(len(shape(hidden)))]
        if isinstance(hidden, core.Literal) or isinstance(product.invars[side], core.Literal):
            raise NotThis("")
        self._operands = {hidden: tuple(of_hidden), product.invars[side]: (NEITHER, NEITHER)}

    @property
    def of_a_row(self) -> int:
        """How many logits the positions that would be divided have."""
        return self.length * self._vocabulary

    def region(self) -> Region:
        """Return the region of the product. Raises NotThis if what it gives is not worked on by position."""
        for eqn in self._after:
            self._follow(eqn)
        if not self.normalised:
            raise NotThis("")
        region, needed = [], set()
        for eqn in reversed([eqn for eqn in self._after if id(eqn) in self._depending_eqns]):
            inside = any(VOCABULARY in self.kinds.get(atom, ()) for atom in _values(eqn))
            if inside or any(var in needed for var in eqn.outvars):
                region.append(eqn)
                needed.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
        region = [self._product, *region[::-1]]
        made = {var for eqn in region for var in eqn.outvars}
        equations, inputs = self._with_inputs(region, made)
        outputs = self._outputs(equations)
        return Region(
            scope=self._scope,
            product=self._product,
            equations=equations,
            inputs=inputs,
            outputs=outputs,
            kinds=self.kinds,
            length=self.length,
            cut=self.cut or (0, self.length),
            depending=self._depending_eqns,
        )

    def _follow(self, eqn: core.JaxprEqn) -> None:
        read = [atom for atom in eqn.invars if not isinstance(atom, core.Literal)]
        depends = [atom for atom in read if atom in self._depending]
        if not depends:
            return
        self._depending.update(eqn.outvars)
        self._depending_eqns.add(id(eqn))
        known = all(atom in self.kinds for atom in depends)
        found = self._kinds_of_result(eqn, depends) if known and not eqn.effects else None
        vocabulary = any(VOCABULARY in self.kinds.get(atom, ()) for atom in depends)
        if found is None:
            if vocabulary:
                raise NotThis(f"{eqn.primitive.name} reads its logits otherwise than by position")
            return
        if vocabulary and not known:
            raise NotThis("its logits meet what was made of all of them")
        self._exponential |= vocabulary and eqn.primitive.name == "exp"
        summed = eqn.primitive.name == "reduce_sum" and VOCABULARY not in found
        self.normalised |= vocabulary and summed and self._exponential
        self.kinds.update((var, found) for var in eqn.outvars)

    def _kinds_of_result(self, eqn: core.JaxprEqn, depends: Sequence[Any]) -> Kinds | None:
        name, after = eqn.primitive.name, shape(eqn.outvars[0])
        first = self.kinds[depends[0]]
        if name in _POINTWISE:
            return self._pointwise(depends, after)
        if name in _REDUCED:
            axes = {int(axis) for axis in eqn.params["axes"]}
            if any(first[axis] in POSITIONS for axis in axes):
                return None
            return tuple(kind for n, kind in enumerate(first) if n not in axes)
        if name == "broadcast_in_dim":
            where = list(eqn.params["broadcast_dimensions"])
            before = shape(eqn.invars[0])
            return tuple(
                first[where.index(d)]
                if d in where and before[where.index(d)] == size
                else VOCABULARY
                if size == self._vocabulary
                else NEITHER
                for d, size in enumerate(after)
            )
        if name == "transpose":
            return tuple(first[d] for d in eqn.params["permutation"])
        if name in ("squeeze", "reshape"):
            return _of_reshape(first, shape(eqn.invars[0]), after)
        if name == "slice":
            return self._sliced(eqn, first)
        if name == "dot_general":
            return self._multiplied(eqn, depends)
        return _picked(eqn, first) if name == "gather" and depends == [eqn.invars[0]] else None

    def _multiplied(self, eqn: core.JaxprEqn, depends: Sequence[Any]) -> Kinds | None:
        """Return the kinds of a product with what has the same positions, such as one-hot targets."""
        known = [self.kinds[a] if a in depends else None for a in eqn.invars]
        contracted, batch = eqn.params["dimension_numbers"]
        for kinds, dims in zip(known, contracted, strict=True):
            if kinds is not None and any(kinds[d] in POSITIONS for d in dims):
                return None
        found: list[str] = []
        for pair in zip(*batch, strict=True):
            each = {kinds[d] for kinds, d in zip(known, pair, strict=True) if kinds is not None}
            if len(each) > 1:
                return None
            found += each
        for n, (kinds, atom) in enumerate(zip(known, eqn.invars, strict=True)):
            free = [d for d in range(len(shape(atom))) if d not in (*contracted[n], *batch[n])]
            if free and kinds is None:
                return None
            found += [kinds[d] for d in free] if kinds is not None else []
        return tuple(found) if sum(kind in (DIVIDED, MERGED) for kind in found) == 1 else None

    def _pointwise(self, depends: Sequence[Any], after: tuple[int, ...]) -> Kinds | None:
        found = []
        for d, size in enumerate(after):
            kinds = {self.kinds[a][d] for a in depends if len(shape(a)) == len(after) and shape(a)[d] == size}
            kinds -= {NEITHER} if len(kinds) > 1 else set()
            if len(kinds) > 1:
                return None
            found.append(next(iter(kinds), NEITHER))
        return tuple(found)

    def _sliced(self, eqn: core.JaxprEqn, first: Kinds) -> Kinds | None:
        starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
        if any(step != 1 for step in eqn.params["strides"] or ()):
            return None
        for d, kind in enumerate(first):
            whole = (0, shape(eqn.invars[0])[d])
            if kind in (DIVIDED, OTHER) and (starts[d], limits[d]) != whole:
                if kind == OTHER or self.cut not in (None, (starts[d], limits[d])) or whole[1] != self.length:
                    return None
                self.cut = (starts[d], limits[d])
        return first

    def _with_inputs(
        self, region: Sequence[core.JaxprEqn], made: set[Any]
    ) -> tuple[list[core.JaxprEqn], list[Any]]:
        """Return a region with what lays out its inputs over the vocabulary, and what it reads then."""
        self.kinds.update(self._operands)
        inputs: dict[Any, None] = dict.fromkeys(self._operands)
        laid: list[core.JaxprEqn] = []
        done: set[Any] = set(self._operands)

        def take(atom: Any, kinds: Kinds) -> None:
            if isinstance(atom, core.Literal) or atom in made:
                return
            if atom in self._depending:
                raise NotThis("its logits meet what was made of all of them")
            if atom in done:
                if self.kinds[atom] != kinds:
                    raise NotThis("an array is read along positions and otherwise too")
                return
            done.add(atom)
            self.kinds[atom] = kinds
            eqn = self._maker.get(atom) if VOCABULARY in kinds else None
            before = None if eqn is None else _kinds_before(eqn, kinds)
            if eqn is None or before is None:
                inputs[atom] = None
                return
            for one, of_one in zip(eqn.invars, before, strict=True):
                take(one, of_one)
            laid.append(eqn)

        self._maker = {var: eqn for eqn in self._scope.equations for var in eqn.outvars}
        for eqn in region[1:]:
            for n, atom in enumerate(eqn.invars):
                if not isinstance(atom, core.Literal) and atom not in made:
                    take(atom, self._kinds_of_operand(eqn, n))
        return [region[0], *laid, *region[1:]], list(inputs)

    def _kinds_of_operand(self, eqn: core.JaxprEqn, n: int) -> Kinds:
        """Return the kinds of an operand that does not depend on the product."""
        before, of_result = shape(eqn.invars[n]), self.kinds[eqn.outvars[0]]
        if eqn.primitive.name == "dot_general":
            contracted, batch = eqn.params["dimension_numbers"]
            other = self.kinds[eqn.invars[1 - n]]
            pairs = [*zip(batch[n], batch[1 - n], strict=True)]
            pairs += zip(contracted[n], contracted[1 - n], strict=True)
            known = {own: other[d] for own, d in pairs}
            return tuple(known.get(d, NEITHER) for d in range(len(before)))
        if eqn.primitive.name == "gather":
            numbers = eqn.params["dimension_numbers"]
            of_operand = self.kinds[eqn.invars[0]]
            pairs = zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
            known = {d: of_operand[other] for d, other in pairs}
            return tuple(known.get(d, NEITHER) for d in range(len(before)))
        return _like(before, shape(eqn.outvars[0]), of_result)

    def _outputs(self, equations: Sequence[core.JaxprEqn]) -> list[Any]:
        inside = {id(eqn) for eqn in equations}
        made = {var for eqn in equations if id(eqn) in inside for var in eqn.outvars}
        read = [atom for eqn in self._scope.equations if id(eqn) not in inside for atom in eqn.invars]
        read += self._scope.outvars
        outputs = list(dict.fromkeys(a for a in read if not isinstance(a, core.Literal) and a in made))
        depending = [one for one in outputs if one in self._depending]
        if any(VOCABULARY in self.kinds[one] for one in depending):
            raise NotThis("its logits are read by something else")
        return depending


def _in_a_loop(scope: Opened) -> bool:
    one: Opened | None = scope
    while one is not None and (one.at is None or one.at.primitive.name != "scan"):
        one = one.outer
    return one is not None


def _values(eqn: core.JaxprEqn) -> list[Any]:
    return [atom for atom in (*eqn.invars, *eqn.outvars) if not isinstance(atom, core.Literal)]


def _like(before: tuple[int, ...], after: tuple[int, ...], kinds: Kinds) -> Kinds:
    """Return the kinds of an operand of something pointwise, where it is as long as the result."""
    if len(before) != len(after):
        return (NEITHER,) * len(before)
    return tuple(
        kind if size == other and size > 1 else NEITHER
        for size, other, kind in zip(before, after, kinds, strict=True)
    )


def _picked(eqn: core.JaxprEqn, first: Kinds) -> Kinds | None:
    """Return the kinds of what is picked at each position."""
    numbers = eqn.params["dimension_numbers"]
    batching, offset = numbers.operand_batching_dims, [int(d) for d in numbers.offset_dims]
    rows = {d for d, kind in enumerate(first) if kind in POSITIONS}
    sliced = [
        d
        for d in range(len(first))
        if d not in batching and d not in numbers.collapsed_slice_dims and eqn.params["slice_sizes"][d] > 1
    ]
    if sliced or not rows <= set(batching):
        return None
    of_indices = dict(zip(numbers.start_indices_batching_dims, batching, strict=True))
    # What is no slice is at a place of the indices, in their order.
    rank = len(shape(eqn.outvars[0]))
    places = iter(range(rank))
    found = [None if d in offset else of_indices.get(next(places)) for d in range(rank)]
    return tuple(NEITHER if one is None else first[one] for one in found)


def _of_reshape(kinds: Kinds, before: tuple[int, ...], after: tuple[int, ...]) -> Kinds | None:
    """Return the kinds after a reshape that adds and drops dimensions of size 1, or merges all positions."""
    kept = [(kind, size) for kind, size in zip(kinds, before, strict=True) if size > 1]
    wanted = [size for size in after if size > 1]
    if [size for _, size in kept] != wanted:
        kept = _laid_end_to_end(kept) or []
        if [size for _, size in kept] != wanted:
            return None
    rest = iter(kept)
    return tuple(next(rest)[0] if size > 1 else NEITHER for size in after)


def _laid_end_to_end(kept: Sequence[tuple[str, int]]) -> list[tuple[str, int]] | None:
    """Return dimensions with all positions, in order, as one."""
    places = [n for n, (kind, _) in enumerate(kept) if kind in (OTHER, DIVIDED)]
    if not places or kept[places[-1]][0] != DIVIDED or places != list(range(places[0], places[-1] + 1)):
        return None
    size = math.prod(kept[n][1] for n in places)
    return [*kept[: places[0]], (MERGED, size), *kept[places[-1] + 1 :]]


def _kinds_before(eqn: core.JaxprEqn, kinds: Kinds) -> list[Kinds] | None:
    """Return the kinds of what is laid out over the vocabulary by `eqn`, None if it does more."""
    name, after = eqn.primitive.name, shape(eqn.outvars[0])
    if eqn.effects:
        return None
    if name in _POINTWISE:
        return [_like(shape(atom), after, kinds) for atom in eqn.invars]
    if name in ("broadcast_in_dim", "transpose", "squeeze"):
        found = moved(eqn, kinds, NEITHER)
        return None if found is None else [tuple(found)]
    if name == "reshape":
        found = _of_reshape(kinds, after, shape(eqn.invars[0]))
        return None if found is None else [found]
    if name == "iota":
        return None if kinds[eqn.params["dimension"]] in POSITIONS else []
    return None


def chunks_of(region: Region) -> tuple[int, int]:
    """Return how many positions are worked on at a time, and how often; a few may be added at the end.

    Of a sequence so many that one row has a quarter of a GiB of logits, and at most half of it; of positions
    that are not told apart, a sixteenth.
    """
    of_product = region.kinds[region.product.outvars[0]]
    sizes = shape(region.product.outvars[0])
    vocabulary = sizes[of_product.index(VOCABULARY)]
    most = max(1, min(ROW_CHUNK // vocabulary, region.length // 2))
    if OTHER not in of_product:
        most = max(1, region.length // _CHUNKS)
    best = next(size for size in range(most, 0, -1) if region.length % size == 0)
    chunk = best if 4 * best >= most else most
    return chunk, -(-region.length // chunk)


def placed(region: Region) -> core.JaxprEqn:
    """Put one equation, which is returned, in the place of a region: it gives the region's outputs."""
    scope, inside = region.scope, {id(eqn) for eqn in region.equations}
    last = region.equations[-1]
    laying = {id(eqn) for eqn in region.equations if id(eqn) not in region.depending} - {id(region.product)}
    site = last.replace(outvars=list(region.outputs))
    site = site.replace(source_info=region.product.source_info)
    ordered, waiting, passed = [], [], False
    for eqn in scope.equations:
        if eqn is last:
            ordered += [site, *waiting]
            passed = True
        elif id(eqn) in inside and id(eqn) not in laying:
            continue
        elif id(eqn) in region.depending and not passed:
            waiting.append(eqn)
        else:
            ordered.append(eqn)
    scope.equations[:] = ordered
    return site
