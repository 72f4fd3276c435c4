"""What an operation does to the dimensions of its arrays, in the notation of an einsum."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from ...errors import UserError, nearest

Shape = tuple[int, ...]

# What sharding a factor of an operation costs and saves:
#   map       each shard is computed from the same shard of the operands: work is divided, nothing moves
#   contract  summed over (a matmul's contraction, a sum): work is divided, results are partial sums
#   reduce    reduced by something other than a sum (max, any, argmax): as `contract`, with that reduction
#   index     looked up or written at computed places: every shard serves its own part, results are partial
#   group     chosen per row by group (ragged matmul's experts): as `contract`; no multiple of the work
#   resize    cut, padded, joined, flipped or windowed: shards exchange with their neighbours
#   window    a small window inside one shard's work (a kernel's height): never sharded
#   scan      walked one step after another by a loop
#   whole     needed whole on every device that computes (sort, cumulative sums, FFT, unknown operations)
Kind = Literal["map", "contract", "reduce", "index", "group", "resize", "window", "scan", "whole"]

KINDS: frozenset[str] = frozenset(Kind.__args__)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
    """An equation as a rule sees it: shapes in, shapes out, and the primitive's parameters."""

    name: str
    ins: tuple[Shape, ...]
    outs: tuple[Shape, ...]
    params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class OpRule:
    """The factors of one operation, and where each stands in its arrays.

    `ins[operand][dimension]` is the tuple of factors (indices into `kinds` and `sizes`) that make up that
    dimension, major to minor: empty for size 1 (or a size that is broadcast), one for most, several where a
    reshape merges or splits. `kin` pairs factors of different sizes that one would shard alike (before and
    after a slice, the pieces of a concatenation).
    """

    kinds: tuple[Kind, ...]
    sizes: tuple[int, ...]
    ins: tuple[tuple[tuple[int, ...], ...], ...]
    outs: tuple[tuple[tuple[int, ...], ...], ...]
    kin: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check that the factors say what they are."""
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"a factor cannot be of kind {kind!r}: {nearest(kind, KINDS)}")

    def check(self, op: Op) -> None:
        """Refuse a rule that does not fit the shapes of `op`, naming the array."""
        for side, places, shapes in (("operand", self.ins, op.ins), ("result", self.outs, op.outs)):
            if len(places) != len(shapes):
                raise UserError(f"the rule of {op.name} describes {len(places)} {side}s, not {len(shapes)}")
            for number, (dims, shape) in enumerate(zip(places, shapes, strict=True)):
                sizes = tuple(math.prod(self.sizes[f] for f in dim) for dim in dims)
                if len(sizes) != len(shape) or any(
                    s != n and d for s, n, d in zip(sizes, shape, dims, strict=True)
                ):
                    raise UserError(
                        f"the rule of {op.name} says {list(sizes)} for {side} {number}, "
                        f"whose shape is {list(shape)}"
                    )


Rule = Callable[[Op], OpRule]


Place = tuple[int, int]


@functools.lru_cache(maxsize=8192)
def places(rule: OpRule) -> tuple[tuple[tuple[Place, ...], tuple[Place, ...]], ...]:
    """Return, for each factor, the (operand, dimension) and the (result, dimension) places it stands in."""
    found: tuple[tuple[list[Place], list[Place]], ...] = tuple(([], []) for _ in rule.kinds)
    for side, arrays in enumerate((rule.ins, rule.outs)):
        for number, dims in enumerate(arrays):
            for dim, factors in enumerate(dims):
                for factor in factors:
                    found[factor][side].append((number, dim))
    return tuple((tuple(ins), tuple(outs)) for ins, outs in found)


class Builder:
    """Collects the factors of an operation, dimension by dimension.

    A dimension nobody placed becomes a `whole` factor of its own.
    """

    def __init__(self, op: Op) -> None:
        self._op = op
        self._kinds: list[Kind] = []
        self._sizes: list[int] = []
        self._ins: list[list[tuple[int, ...] | None]] = [[None] * len(shape) for shape in op.ins]
        self._outs: list[list[tuple[int, ...] | None]] = [[None] * len(shape) for shape in op.outs]
        self._kin: list[tuple[int, int]] = []

    def factor(
        self,
        kind: Kind,
        size: int,
        ins: Sequence[tuple[int, int]] = (),
        outs: Sequence[tuple[int, int]] = (),
    ) -> int | None:
        """Add a factor that is the whole of the given (operand, dimension) and (result, dimension) places.

        Returns its index, or None for size 1, which is no factor.
        """
        place: tuple[int, ...] = ()
        if size != 1:
            place = (len(self._kinds),)
            self._kinds.append(kind)
            self._sizes.append(size)
        for operand, dim in ins:
            self._ins[operand][dim] = place
        for result, dim in outs:
            self._outs[result][dim] = place
        return place[0] if place else None

    def put_in(self, operand: int, dim: int, *factors: int | None) -> None:
        """Say that a dimension of an operand consists of `factors`, major to minor."""
        self._ins[operand][dim] = tuple(f for f in factors if f is not None)

    def put_out(self, result: int, dim: int, *factors: int | None) -> None:
        """Say that a dimension of a result consists of `factors`, major to minor."""
        self._outs[result][dim] = tuple(f for f in factors if f is not None)

    def resized(self, operand: int, dim: int, result: int, out_dim: int, kind: Kind = "resize") -> None:
        """Relate a dimension to the one it becomes: one factor if the size stays, kin if it does not."""
        before, after = self._op.ins[operand][dim], self._op.outs[result][out_dim]
        if before == after:
            self.factor(kind, before, [(operand, dim)], [(result, out_dim)])
            return
        a = self.factor(kind, before, [(operand, dim)])
        b = self.factor(kind, after, (), [(result, out_dim)])
        self.kin(a, b)

    def kin(self, a: int | None, b: int | None) -> None:
        """Say that two factors of different sizes would rather be sharded alike."""
        if a is not None and b is not None:
            self._kin.append((a, b))

    def done(self) -> OpRule:
        """Return the rule."""
        ins = tuple(self._fill(s, d) for s, d in zip(self._op.ins, self._ins, strict=True))
        outs = tuple(self._fill(s, d) for s, d in zip(self._op.outs, self._outs, strict=True))
        return OpRule(tuple(self._kinds), tuple(self._sizes), ins, outs, tuple(self._kin))

    def _fill(self, shape: Shape, dims: list[tuple[int, ...] | None]) -> tuple[tuple[int, ...], ...]:
        for dim, place in enumerate(dims):
            if place is None:
                factor = self.factor("whole", shape[dim])
                dims[dim] = () if factor is None else (factor,)
        return cast(tuple[tuple[int, ...], ...], tuple(dims))


def whole_rule(op: Op) -> OpRule:
    """Keep every dimension whole and relate none: the rule of what is not known."""
    return Builder(op).done()


def einsum_rule(op: Op, pattern: str, **kinds: str) -> OpRule:
    """Write a rule as an einsum whose letters are factors.

    Letters of one kind are given by that kind's name; a letter that is missing from the results is
    ``contract``, any other is ``map``. ``"bqhd, bkhd, bkhd -> bqhd", whole="kd"`` describes an attention
    kernel that needs keys and head dimension whole.

    Raises:
        UserError: when the pattern does not fit the shapes of `op`.
    """
    left, arrow, right = pattern.partition("->")
    if not arrow:
        raise UserError(f"the pattern {pattern!r} of {op.name} has no '->' between operands and results")
    in_terms = [term.strip() for term in left.split(",")] if left.strip() else []
    out_terms = [term.strip() for term in right.split(",")] if right.strip() else []
    kind_of: dict[str, str] = {letter: kind for kind, letters in kinds.items() for letter in letters}
    sizes: dict[str, int] = {}
    for terms, shapes, side in ((in_terms, op.ins, "operands"), (out_terms, op.outs, "results")):
        if [len(term) for term in terms] != [len(shape) for shape in shapes]:
            raise UserError(
                f"the pattern {pattern!r} does not fit the {side} of {op.name}, shaped {list(shapes)}"
            )
        for term, shape in zip(terms, shapes, strict=True):
            for letter, size in zip(term, shape, strict=True):
                sizes[letter] = size if sizes.get(letter, 1) == 1 else sizes[letter]
    builder = Builder(op)
    for letter, size in sizes.items():
        default = "map" if any(letter in term for term in out_terms) else "contract"
        kind = cast(Kind, kind_of.get(letter, default))
        ins = _places(letter, in_terms, op.ins)
        builder.factor(kind, size, ins, _places(letter, out_terms, op.outs))
    for terms, shapes, put in (
        (in_terms, op.ins, builder.put_in),
        (out_terms, op.outs, builder.put_out),
    ):
        for number, (term, shape) in enumerate(zip(terms, shapes, strict=True)):
            for dim in range(len(term)):
                if shape[dim] == 1:
                    put(number, dim)
    rule = builder.done()
    rule.check(op)
    return rule


def _places(letter: str, terms: Sequence[str], shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    return [
        (number, dim)
        for number, term in enumerate(terms)
        for dim, other in enumerate(term)
        if other == letter and shapes[number][dim] != 1
    ]
