"""Attention in a traced program, as people write it.

From each exp of a softmax, back through scale, cap, bias and mask to the product of queries and keys, forward
to the product with values. Dimensions are followed as labels, one for each dimension of the scores, so that
orders of dimensions, transposes and grouped heads are no cases of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from ..pointwise import SAME
from .further import Further, fits, further_product, precision_of, rank
from .masks import NEVER, Labels, Mask, Masks, Part, Scores, is_truth
from .opened import Opened
from .placed import PlacedDims, placed_along, through
from .softmax import Softmax, Softmaxes
from .spans import NotThis
from .values import Sources, shape

# How many equations lie at most between a product and the softmax of its results, and on to the next product.
_FAR = 24

# Tells what is added to scores in one go from what is added in another.
_NUMBERS = itertools.count(1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WrittenAttention:
    """One attention: softmax over keys of scale · query · key, capped and masked, times value.

    Labels number the dimensions of the scores and, last, the width of values; those of an operand are in
    `place`, negative for what is summed over in the scores. `sizes` are by label. `groups` are the dimensions
    of queries that read the same keys. `product` in `scope` gives the result, of labels ``place["out"]``.
    `mask` is taken apart, `written` is not. `sink` is a score that is in the sum of weights alone; weights
    are multiplied by `factors` and `times`; `precision` is what all products ask for. `further` are products
    of other queries and keys that are added to the scores, `scaled` is what scores of a query are
    ``multiplied`` or ``divided`` by. `blank` is what hides scores where weights are put to 0 by it once more:
    a query that sees nothing gets zeros then.
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
    written: Mask
    sink: Part | None = None
    factors: tuple[Part, ...] = ()
    times: float = 1.0
    precision: str | None = None
    further: tuple[Further, ...] = ()
    scaled: tuple[Part, ...] = ()
    blank: Part | None = None


@dataclasses.dataclass(kw_only=True, eq=False)
class _Scoring:
    """What happens to scores on the way from the product to the softmax."""

    scale: float = 1.0
    cap: float | None = None
    parts: list[Part] = dataclasses.field(default_factory=list)
    sink: Part | None = None
    end: bool = True
    scaled: list[Part] = dataclasses.field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether anything but a factor has been put on the scores."""
        return self.cap is not None or self.sink is not None or bool(self.parts)


class AttentionFinder:
    """Finds attention; `missed` are, after a search, equations that are nearly that, and why not."""

    def __init__(self, values: Sources) -> None:
        self.values = values
        self.masks = Masks(values)
        self.missed: list[tuple[core.JaxprEqn, Any, str]] = []
        self._users: dict[Any, list[core.JaxprEqn]] = {}
        self.softmaxes = Softmaxes(values, self._users)
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
        softmax = self.softmaxes.around(exp)
        before = None if softmax is None else self._product_before(softmax.logits, _FAR)
        after = None if softmax is None else self._product_after(softmax.weights, _FAR // 2)
        if softmax is None or before is None or after is None:
            return None
        try:
            return self._attention(softmax, before, after, scope)
        except NotThis as why:
            if str(why):
                self.missed.append((after[1], before[0].outvars[0].aval, str(why)))
            return None

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
                found, known = self._product_before(eqn.invars[n], depth - 1), self._back[key]
                if found is not None and (known is None or rank(found[0]) > rank(known[0])):
                    self._back[key] = found[0], (*found[1], (eqn, n))
        return self._back[key]

    def _product_after(
        self, atom: Any, depth: int
    ) -> tuple[tuple[tuple[core.JaxprEqn, int], ...], core.JaxprEqn, int] | None:
        """Return the steps from weights to the product that reads them, it, and which operand they are."""
        for eqn in self._users.get(atom, ()) if depth else ():
            n = next(n for n, one in enumerate(eqn.invars) if one is atom)
            if eqn.primitive.name == "dot_general":
                return (), eqn, n
            if eqn.primitive.name in ("transpose", "reshape", "mul", "div", "select_n", "slice", *SAME):
                found = self._product_after(eqn.outvars[0], depth - 1)
                if found is not None:
                    return ((eqn, n), *found[0]), *found[1:]
        return None

    def _attention(
        self,
        softmax: Softmax,
        before: tuple[core.JaxprEqn, tuple[tuple[core.JaxprEqn, int], ...]],
        after: tuple[tuple[tuple[core.JaxprEqn, int], ...], core.JaxprEqn, int],
        scope: Opened,
    ) -> WrittenAttention:
        (first, steps), (steps_after, last, side) = before, after
        placed = placed_along(first, steps)
        labels = placed.scores
        scoring = _Scoring()
        for eqn, main in steps:
            self._step(eqn, main, labels, scoring)
            labels = through(eqn, labels, placed.sizes)
        if len(labels[softmax.axis]) != 1:
            raise NotThis("")
        keys = labels[softmax.axis][0]
        placed.tell(keys)
        self._hide(softmax, labels, placed.sizes, scoring)
        if softmax.sink is not None:
            self._sink_of_sum(softmax.axis, *softmax.sink, labels, scoring)
        of_weights = labels
        factors, times = [], 1.0
        for eqn, main in steps_after:
            times *= self._change(eqn, main, labels, scoring, factors)
            labels = through(eqn, labels, placed.sizes)
        factors, blank = self._blank(factors, placed.sizes, scoring)
        place, width = placed.last(last, side, labels)
        result = last
        if softmax.late:
            sizes = (*placed.sizes, width)
            result, place["out"] = self._divided(softmax, last, place["out"], of_weights, sizes)
        else:
            self._check_readers(softmax.weights, steps_after, last)
        further, scaled = self._further(first, placed, keys, scoring), self._scaled(placed, keys, scoring)
        rows = self._rows(placed, scoring.parts)
        scores = Scores(sizes=placed.sizes, batch=placed.batch, rows=rows, keys=keys)
        groups = tuple(d for d in placed.free if d != rows)
        return WrittenAttention(
            product=result,
            scope=scope,
            query=first.invars[placed.query],
            key=first.invars[1 - placed.query],
            value=last.invars[1 - side],
            place=place,
            scores=scores,
            groups=groups,
            sizes=(*placed.sizes, width),
            scale=scoring.scale,
            cap=scoring.cap,
            mask=self.masks.read(scoring.parts, scores),
            written=self.masks.read(scoring.parts, scores, apart=False),
            scores_aval=first.outvars[0].aval,
            sink=None if scoring.sink is None else self.masks.stripped(scoring.sink, placed.sizes),
            factors=tuple(factors),
            times=times,
            precision=precision_of(first, *(one.product for one in further), last),
            further=further,
            scaled=scaled,
            blank=blank,
        )

    def _further(
        self, first: core.JaxprEqn, placed: PlacedDims, keys: int, scoring: _Scoring
    ) -> tuple[Further, ...]:
        """Return what is added to scores as products of queries and keys, and take it out of the parts."""
        products, parts = [], []
        for part in scoring.parts:
            found = self._product_before(part.atom, _FAR // 2) if part.how == "added" else None
            one = found and further_product(self.values, part, found, first, placed.sizes, keys)
            if one is None or not fits(one, placed.batch, placed.free, keys):
                parts.append(part)
            elif scoring.scaled:
                raise NotThis("one of its products is multiplied by an array")
            else:
                products.append(one)
        scoring.parts = parts
        return tuple(products)

    def _scaled(self, placed: PlacedDims, keys: int, scoring: _Scoring) -> tuple[Part, ...]:
        """Return what the scores of a query are multiplied by alike."""
        found = tuple(self.masks.stripped(part, placed.sizes) for part in scoring.scaled)
        if any(keys in part.has() for part in found):
            raise NotThis("its scores are multiplied by an array")
        return found

    def _divided(
        self, softmax: Softmax, last: core.JaxprEqn, labels: Labels, of_weights: Labels, sizes: Sequence[int]
    ) -> tuple[core.JaxprEqn, Labels]:
        """Return the division of what `last` gives by the sum of weights of each query, and its labels."""
        atom = last.outvars[0]
        while atom not in self._results and len(users := self._users.get(atom, [])) == 1:
            (eqn,) = users
            if eqn.primitive.name not in ("transpose", "reshape", "squeeze", *SAME):
                break
            labels, atom = through(eqn, labels, sizes), eqn.outvars[0]
        for eqn in self._users.get(atom, []):
            if eqn.primitive.name != "div" or eqn.invars[0] is not atom:
                continue
            found = self.softmaxes.sums(eqn.invars[1], softmax.numerator)
            if found is None or found.over != (softmax.axis,) or found.hidden:
                continue
            told = [() if d is None else of_weights[d] for d in found.dims]
            summed = [one for n, one in enumerate(of_weights) if n != softmax.axis]
            # Each query of each head has a sum of its own.
            fits = all(one in ((), label) for one, label in zip(told, labels, strict=True))
            if fits and all(one in told or math.prod(sizes[d] for d in one) == 1 for one in summed):
                return eqn, labels
        raise NotThis("")

    def _rows(self, placed: PlacedDims, parts: Sequence[Part]) -> int:
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
            if by is None and not (main == 1 and name == "div") and not scoring.changed:
                # Numbers of a query are as well put on the query itself.
                sizes = shape(others[0])
                here = tuple(() if size == 1 else one for size, one in zip(sizes, labels, strict=False))
                how = "multiplied" if name == "mul" else "divided"
                scoring.scaled.append(Part(atom=others[0], labels=here, how=how, fill=1.0))
                return
            if by is None or not by > 0 or (name == "div" and main == 1):
                raise NotThis("its scores are multiplied by an array")
            by = 1 / by if name == "div" else by
            if scoring.cap is not None:
                if scoring.parts:
                    raise NotThis("its scores are scaled after a mask")
                scoring.cap *= by
            elif scoring.sink is not None:
                raise NotThis("its scores are scaled beside a sink")
            else:
                scoring.scale *= by
                # A hidden score is scaled too, and what was added.
                scoring.parts = [dataclasses.replace(p, fill=p.fill * by) for p in scoring.parts]
        elif name == "tanh":
            if scoring.cap is not None or scoring.parts:
                raise NotThis("its scores are capped twice, or after a mask")
            scoring.cap = 1.0
        elif name in ("concatenate", "pad"):
            self._sink(eqn, main, labels, scoring)
        elif name in ("add", "sub", "select_n") and scoring.sink is not None:
            raise NotThis("its scores are changed beside a sink")
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

    def _hide(self, softmax: Softmax, labels: Labels, sizes: Sequence[int], scoring: _Scoring) -> None:
        """Take note of what puts exps to 0, or those that are summed, and has not hidden scores before."""
        for eqn in softmax.hidden:
            part = self._putting(eqn, labels)
            if self._hides_again(part, sizes, scoring) is not None:
                continue
            if eqn.outvars[0] is not softmax.numerator:
                raise NotThis("its weights are divided by the sum of some")
            scoring.parts.append(dataclasses.replace(part, fill=-math.inf))

    def _putting(self, eqn: core.JaxprEqn, labels: Labels) -> Part:
        """Return what puts 0, or another number, in the place of weights."""
        how = "true" if self.values.number(eqn.invars[1]) is None else "false"
        which = eqn.invars[0]
        return Part(atom=which, labels=labels if shape(which) else (), how=how, fill=0.0)

    def _hides_again(self, part: Part, sizes: Sequence[int], scoring: _Scoring) -> Part | None:
        """Return what hides the scores whose weights `part` puts to 0."""
        again = self._truth(part, sizes)
        for one in scoring.parts:
            before = self._truth(one, sizes)
            alike = (before.how, before.labels) == (again.how, again.labels)
            if alike and before.how != "added" and self.values.same(before.atom, again.atom):
                return one
        return None

    def _truth(self, part: Part, sizes: Sequence[int]) -> Part:
        """Return a condition before it was laid out, one that is multiplied by as the truth value it was."""
        found = self.masks.stripped(part, sizes)
        multiplied = part.how == "added" and part.added == 0 and is_truth(found.atom)
        return dataclasses.replace(found, how="false") if multiplied else found

    def _blank(
        self, factors: Sequence[Part], sizes: Sequence[int], scoring: _Scoring
    ) -> tuple[list[Part], Part | None]:
        """Return the factors that do more than put hidden weights to 0, and what hides those that others do.

        Weights are no numbers where all is hidden by minus infinity: what puts those to 0 does so too.
        """
        hides = [part for part in scoring.parts if part.how != "added"]
        kept, blank = [], None
        for factor in factors:
            if self._tests(factor.atom, "ne"):
                if len(hides) != 1 or math.isfinite(hides[0].fill):
                    raise NotThis("its weights are replaced where they are no numbers")
                blank = hides[0]
            elif len(hides) == 1 and self._hides_again(factor, sizes, scoring) is hides[0]:
                blank = hides[0]
            else:
                kept.append(factor)
        return kept, blank

    def _tests(self, atom: Any, *names: str) -> bool:
        """Whether an atom says which weights are no numbers (``ne``), or endless (``eq``), as none are."""
        eqn = self.values.made(atom, *names)
        if eqn is None or len(eqn.invars) != 2:
            return False
        if eqn.primitive.name == "ne":
            return self.values.same(*eqn.invars)
        number = self.values.number(eqn.invars[1])
        return number is not None and math.isinf(number)

    def _sink(self, eqn: core.JaxprEqn, main: int, labels: Labels, scoring: _Scoring) -> None:
        """Take note of one score more for each query, that of no key."""
        before, after = shape(eqn.invars[main]), shape(eqn.outvars[0])
        wider = [d for d, sizes in enumerate(zip(before, after, strict=True)) if sizes[0] != sizes[1]]
        if scoring.sink is not None or len(wider) != 1 or after[wider[0]] != before[wider[0]] + 1:
            raise NotThis("")
        if eqn.primitive.name == "pad":
            atom, (low, high, inside) = eqn.invars[1], eqn.params["padding_config"][wider[0]]
            if inside or low < 0 or high < 0:
                raise NotThis("")
            scoring.end, here = high == 1, ()
        else:
            atom, scoring.end = eqn.invars[1 - main], main == 0
            here = tuple(() if d == wider[0] else one for d, one in enumerate(labels))
        scoring.sink = Part(atom=atom, labels=here, how="added", fill=1.0)

    def _sink_of_sum(
        self, axis: int, atom: Any, places: Sequence[int], labels: Labels, scoring: _Scoring
    ) -> None:
        """Take note of a score that is in the sum of weights alone."""
        sizes = dict(zip(places, shape(atom), strict=True))
        if scoring.sink is not None or sizes.get(axis, 1) != 1:
            raise NotThis("its sum has more added than one score for each query")
        here = tuple(() if size == 1 else labels[d] for d, size in sizes.items())
        scoring.sink = Part(atom=atom, labels=here, how="added", fill=1.0)

    def _change(
        self, eqn: core.JaxprEqn, main: int, labels: Labels, scoring: _Scoring, factors: list[Part]
    ) -> float:
        """Take note of what `eqn` multiplies its operand `main`, weights, by; return it if it is a number."""
        name = eqn.primitive.name
        if name == "slice":
            whole, cut = shape(eqn.invars[0]), shape(eqn.outvars[0])
            first = next((start for start in eqn.params["start_indices"] if start), 0)
            lost = [one - other for one, other in zip(whole, cut, strict=True) if one != other]
            if scoring.sink is None or lost != [1] or first != (0 if scoring.end else 1):
                raise NotThis("")
            return 1.0
        if name not in ("mul", "div", "select_n"):
            return 1.0
        if name == "select_n" and self._tests(eqn.invars[0], "eq"):
            return 1.0
        if name == "select_n":
            other = eqn.invars[3 - main]
            if main == 0 or self.values.number(other) != 0:
                raise NotThis("its weights are replaced by others")
            which = eqn.invars[0]
            here = labels if shape(which) else ()
            part = Part(atom=which, labels=here, how="false" if main == 2 else "true", fill=0.0)
            factors.append(part)
            return 1.0
        by = self.values.number(eqn.invars[1 - main])
        if by is not None and (name == "mul" or (main == 0 and by != 0)):
            return by if name == "mul" else 1 / by
        if name == "div":
            raise NotThis("its weights are divided by an array")
        return self._multiplied(eqn.invars[1 - main], labels, factors)

    def _multiplied(self, atom: Any, labels: Labels, factors: list[Part]) -> float:
        """Take note of an array that weights are multiplied by, and return the number that is in it."""
        here = labels if len(shape(atom)) == len(labels) else ()
        eqn = self.values.made(atom, "mul", "div", "convert_element_type")
        if eqn is not None and eqn.primitive.name != "convert_element_type":
            by = self.values.number(eqn.invars[1])
            if by:
                times = by if eqn.primitive.name == "mul" else 1 / by
                return times * self._multiplied(eqn.invars[0], labels, factors)
        if eqn is not None and is_truth(eqn.invars[0]):
            factors.append(Part(atom=eqn.invars[0], labels=here, how="false", fill=0.0))
        else:
            factors.append(Part(atom=atom, labels=here, how="added", fill=1.0))
        return 1.0

    def _check_readers(
        self, weights: Any, steps: Sequence[tuple[core.JaxprEqn, int]], last: core.JaxprEqn
    ) -> None:
        """Raise NotThis if weights are read by anything but the sum of values."""
        on_the_way = [weights, *(eqn.outvars[0] for eqn, _ in steps)]
        readers = [*(eqn for eqn, _ in steps), last]
        for atom, reader in zip(on_the_way, readers, strict=True):
            others = (eqn for eqn in self._users.get(atom, ()) if eqn is not reader)
            if atom in self._results or any(not self._tests(eqn.outvars[0], "ne", "eq") for eqn in others):
                raise NotThis("its weights are read by more than the sum of values")


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
    "concatenate": (0, 1),
    "pad": (0,),
}


def live(scope: Opened) -> list[core.JaxprEqn]:
    """Return the equations of a scope that its results depend on."""
    needed = {atom for atom in scope.outvars if not isinstance(atom, core.Literal)}
    kept = []
    for eqn in reversed(scope.equations):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
    return kept[::-1]
