"""Softmaxes in a traced program: around an exp, what is weighed, the weights, and over which dimension."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from ..pointwise import SAME
from .values import Sources, shape

# How many equations lie at most between exps and what is divided by their sum.
_NEAR = 12


class Softmax(NamedTuple):
    """A softmax over the dimension `axis` of `logits`.

    `late` says that `weights` are not divided yet. `hidden` are the equations that put 0 in the place of exps
    of what is not seen: of those that are `numerator`, or of those that are summed. `sink` is a score whose
    exp is added to that sum, and which dimensions of logits those that it has are.
    """

    axis: int
    logits: Any
    weights: Any
    numerator: Any
    late: bool = False
    hidden: tuple[core.JaxprEqn, ...] = ()
    sink: tuple[Any, tuple[int, ...]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summed:
    """Sums of an array: `dims` are those of the array that are left, `over` those that are gone.

    `hidden` are the equations that put 0 in the place of some numbers before.
    """

    dims: tuple[int | None, ...]
    over: tuple[int | None, ...] = ()
    hidden: tuple[core.JaxprEqn, ...] = ()


class Softmaxes:
    """Reads softmaxes; `users` are the equations that read a value."""

    def __init__(self, values: Sources, users: Mapping[Any, Sequence[core.JaxprEqn]]) -> None:
        self.values = values
        self._users = users

    def around(self, exp: core.JaxprEqn) -> Softmax | None:
        """Return a softmax around `exp`, whose weights may be divided only after values were summed."""
        less = self.values.made(exp.invars[0], "sub")
        logits = less.invars[0] if less is not None else exp.invars[0]
        power = exp.outvars[0]
        if less is not None and (axis := self._normal(less)) is not None:
            return Softmax(axis, logits, power, power)
        hidden = [eqn for eqn in self.uses(power) if self._hides(eqn)]
        for numerator, before in ((power, ()), *((eqn.outvars[0], (eqn,)) for eqn in hidden)):
            found = self._divided(numerator, less) or self._late(numerator)
            # What is subtracted of all scores of a query alike changes nothing but the range of numbers.
            if found is not None and (less is None or self._alike_along(less.invars[1], found.axis)):
                return found._replace(logits=logits, hidden=(*before, *found.hidden))
        return None

    def uses(self, atom: Any) -> list[core.JaxprEqn]:
        """Return what reads `atom`, through changes of type and name."""
        found = []
        for eqn in self._users.get(atom, ()):
            found += self.uses(eqn.outvars[0]) if eqn.primitive.name in SAME else [eqn]
        return found

    def sums(self, atom: Any, of: Any, depth: int = _NEAR) -> Summed | None:
        """Return what sums of `of` over some dimensions `atom` is; None if it is none."""
        atom = self.values.plain(atom)
        if atom is of:
            return Summed(dims=tuple(range(len(shape(of)))))
        eqn = self.values.made(atom)
        if eqn is None or depth == 0:
            return None
        main = next((n for n in (1, 2) if self._hides(eqn, n)), 0)
        if len(eqn.invars) != 1 and not main:
            return None
        before = self.sums(eqn.invars[main], of, depth - 1)
        if before is None:
            return None
        name = eqn.primitive.name
        if main:
            return None if before.over else dataclasses.replace(before, hidden=(*before.hidden, eqn))
        if name == "reduce_sum" and not before.over:
            axes = tuple(int(axis) for axis in eqn.params["axes"])
            over = tuple(before.dims[axis] for axis in axes)
            left = tuple(one for n, one in enumerate(before.dims) if n not in axes)
            return dataclasses.replace(before, dims=left, over=over)
        dims = _moved(eqn, before.dims)
        return None if dims is None else dataclasses.replace(before, dims=dims)

    def _divided(self, numerator: Any, less: core.JaxprEqn | None) -> Softmax | None:
        """Return a softmax whose weights are `numerator` by its sum, or by that and the exp of a sink."""
        for eqn in self.uses(numerator):
            if eqn.primitive.name != "div" or self.values.plain(eqn.invars[0]) is not numerator:
                continue
            total, sink = self._with_sink(eqn.invars[1], numerator, less)
            found = self.sums(total, numerator)
            dimensions = range(len(shape(numerator)))
            if found is None or any(found.dims[d] not in (d, None) for d in dimensions):
                continue
            axes = [d for d in dimensions if found.dims[d] is None and shape(numerator)[d] > 1]
            if len(axes) == 1 and found.over == (axes[0],):
                return Softmax(axes[0], None, eqn.outvars[0], numerator, hidden=found.hidden, sink=sink)
        return None

    def _with_sink(
        self, atom: Any, numerator: Any, less: core.JaxprEqn | None
    ) -> tuple[Any, tuple[Any, tuple[int, ...]] | None]:
        """Return what is summed of `numerator`, and the score whose exp is added to it, see `Softmax`.

        The same is subtracted of it as of the others, by `less`.
        """
        added = self.values.made(self._unspread(atom)[0], "add")
        if added is None or len(shape(added.outvars[0])) != len(shape(numerator)):
            return atom, None
        for one, other in (added.invars, added.invars[::-1]):
            power, places = self._unspread(other)
            exp = self.values.made(power, "exp")
            if exp is None or power is numerator or self.sums(one, numerator) is None:
                continue
            if less is None:
                return one, (exp.invars[0], places)
            own = self.values.made(exp.invars[0], "sub")
            if own is not None and self._alike(own.invars[1], less.invars[1]):
                return one, (own.invars[0], places)
        return atom, None

    def _unspread(self, atom: Any) -> tuple[Any, tuple[int, ...]]:
        """Return what an array is before it was repeated, and where that one's dimensions are in it."""
        atom = self.values.plain(atom)
        places = tuple(range(len(shape(atom))))
        while (eqn := self.values.made(atom, "broadcast_in_dim")) is not None:
            places = tuple(places[d] for d in eqn.params["broadcast_dimensions"])
            atom = self.values.plain(eqn.invars[0])
        return atom, places

    def _late(self, numerator: Any) -> Softmax | None:
        """Return a softmax, if `numerator` is summed over one dimension."""
        for eqn in self.uses(numerator):
            if eqn.primitive.name == "reduce_sum" and len(eqn.params["axes"]) == 1:
                return Softmax(int(eqn.params["axes"][0]), None, numerator, numerator, late=True)
        return None

    def _normal(self, less: core.JaxprEqn) -> int | None:
        """Return over which dimension exp of a difference sums to 1, the log of that sum being subtracted.

        That is exp of ``s - log(sum(exp(s)))``, or of ``s - (log(sum(exp(s - m))) + m)``.
        """
        logits, most = less.invars[0], None
        log = self.values.made(self._whole(less.invars[1]))
        if log is not None and log.primitive.name == "add":
            sides = [self.values.made(self._whole(one), "log") for one in log.invars]
            n = 0 if sides[0] is not None else 1
            log, most = sides[n], log.invars[1 - n]
        if log is None or log.primitive.name != "log":
            return None
        total = self.values.made(self._whole(log.invars[0]), "reduce_sum")
        exp = None if total is None else self.values.made(total.invars[0], "exp")
        if total is None or exp is None or len(total.params["axes"]) != 1:
            return None
        axis, summed = int(total.params["axes"][0]), exp.invars[0]
        if most is not None:
            inner = self.values.made(summed, "sub")
            if inner is None or not self._alike(inner.invars[1], most):
                return None
            summed = inner.invars[0]
        alike = self.values.same(self.values.plain(summed), self.values.plain(logits))
        return axis if alike and self._alike_along(less.invars[1], axis) else None

    def _whole(self, atom: Any) -> Any:
        """Return what `atom` is before dimensions of size 1 and changes of type."""
        atom = self.values.plain(atom)
        while (eqn := self.values.made(atom, "broadcast_in_dim", "reshape", "squeeze", "abs")) is not None:
            atom = self.values.plain(eqn.invars[0])
        return atom

    def _alike(self, one: Any, other: Any) -> bool:
        return self.values.same(self._whole(one), self._whole(other))

    def _hides(self, eqn: core.JaxprEqn, main: int | None = None) -> bool:
        """Whether an equation puts 0 in the place of some numbers, of its operand `main` if that is given."""
        if eqn.primitive.name != "select_n" or len(eqn.invars) != 3:
            return False
        return any(self.values.number(eqn.invars[3 - n]) == 0 for n in ((1, 2) if main is None else (main,)))

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


def _moved(eqn: core.JaxprEqn, before: Sequence[int | None]) -> tuple[int | None, ...] | None:
    """Return where dimensions go that an equation only moves; None if it does more."""
    name, after = eqn.primitive.name, shape(eqn.outvars[0])
    if name == "transpose":
        return tuple(before[d] for d in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        where = list(eqn.params["broadcast_dimensions"])
        return tuple(before[where.index(d)] if d in where else None for d in range(len(after)))
    if name in ("reshape", "squeeze"):
        sizes = shape(eqn.invars[0])
        rest = iter([one for one, size in zip(before, sizes, strict=True) if size > 1])
        if [size for size in sizes if size > 1] == [size for size in after if size > 1]:
            return tuple(next(rest) if size > 1 else None for size in after)
    return None
