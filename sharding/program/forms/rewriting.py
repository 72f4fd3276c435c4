"""Programs with what was found in them replaced."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from jax.extend import core

from ...words import gib
from ..jaxpr import Traced
from ..lines import line_of
from .attention import AttentionFinder, WrittenAttention
from .calls import Calls
from .chunks import in_chunks
from .library import by_call, by_cudnn
from .losses import RegionFinder, placed, product_with_vocabulary
from .opened import Made, Opening, Rebuilding
from .position import by_position
from .spans import NotThis
from .unread import WEIGHS, unread
from .values import Sources


def with_attention(traced: Traced) -> Traced:
    """Return `traced` with each attention that is found a call of `ops.attention`."""
    if not any(_has(traced.jaxpr.jaxpr, name, {}) for name in (*WEIGHS, "custom_vjp_call")):
        return traced
    opening = Opening(traced.jaxpr)
    values = Sources(opening)
    finder, calls = AttentionFinder(values), Calls(values)
    made: dict[int, Any] = {}
    read = finder.search()
    for one in (*read, *_for_cudnn(opening, finder)):
        try:
            program, inputs = calls.of(one)
        except NotThis as why:
            finder.missed.append((one.product, one.scores_aval, str(why)))
            continue
        made[id(one.product)] = _Bringing(opening, one.scope, program, inputs)
    for one in _called(opening, finder):
        with contextlib.suppress(NotThis):
            if (found := calls.by_blocks(one)) is not None:
                made[id(one.product)] = _Bringing(opening, one.scope, *found)
    known = [atom for one in read for atom in (one.query, one.key)]
    products = [one.product for one in read] + [eqn for eqn, *_ in finder.missed]
    finder.missed += unread(values, known, products)
    notes = _left("attention", "scores", finder.missed)
    return _rebuilt(traced, opening, made, notes)


def _for_cudnn(opening: Opening, finder: AttentionFinder) -> Iterator[WrittenAttention]:
    """Give the attention that is asked of cuDNN."""
    for scope in opening.top.scopes():
        for eqn in scope.equations:
            try:
                found = by_cudnn(eqn, scope, finder.values, finder.masks)
            except NotThis as why:
                finder.missed.append((eqn, eqn.invars[0].aval, str(why)))
                continue
            if found is not None:
                yield found


def _called(opening: Opening, finder: AttentionFinder) -> Iterator[WrittenAttention]:
    """Give the calls of `ops.attention` with a bias, which is read as it is in attention that was written."""
    for scope in opening.top.scopes():
        for eqn in scope.equations:
            with contextlib.suppress(NotThis):
                if (found := by_call(eqn, scope, finder.masks)) is not None:
                    yield found


def with_losses(traced: Traced) -> Traced:
    """Return `traced` with each loss over a large vocabulary worked through in chunks of positions."""
    if not _has_logits(traced.jaxpr.jaxpr, {}):
        return traced
    opening = Opening(traced.jaxpr)
    finder = RegionFinder()
    made: dict[int, Any] = {}
    kept: list[core.JaxprEqn] = []
    for scope in opening.top.scopes():
        by_position(opening, scope)
        # What replaces one region may lie in the next: they are found one after another.
        while (found := finder.search(scope)) and not any(found[0].product is one for one in kept):
            region, program = found[0], in_chunks(found[0])
            site = placed(region)
            kept += [region.product, site]
            made[id(site)] = _Bringing(opening, scope, program, region.inputs)
    notes = _left("a loss over the vocabulary", "logits", finder.missed)
    return _rebuilt(traced, opening, made, notes)


def _rebuilt(traced: Traced, opening: Opening, made: dict[int, Any], notes: list[str]) -> Traced:
    """Return `traced` with what is `made` in place of what was written, and with `notes` besides."""
    if not made and not notes:
        return traced
    jaxpr = Rebuilding(opening, made).program() if made else traced.jaxpr
    return dataclasses.replace(traced, jaxpr=jaxpr, notes=(*traced.notes, *notes))


def _has_logits(jaxpr: core.Jaxpr, known: dict[int, bool]) -> bool:
    """Whether a program has a product with as many results as a large vocabulary gives, anywhere."""
    key = id(jaxpr)
    if key not in known:
        known[key] = any(product_with_vocabulary(eqn) is not None for eqn in jaxpr.eqns) or any(
            _has_logits(inner, known) for eqn in jaxpr.eqns for inner in core.jaxprs_in_params(eqn.params)
        )
    return known[key]


@dataclasses.dataclass(frozen=True, eq=False)
class _Bringing:
    """Gives a program and what it reads, brought into the scope where it is to stand."""

    opening: Opening
    scope: Any
    program: core.ClosedJaxpr
    inputs: list[Any]

    def __call__(self) -> Made:
        """Return the program and its inputs in the scope."""
        return self.program, [self.opening.bring(atom, self.scope) for atom in self.inputs]


def _has(jaxpr: core.Jaxpr, name: str, known: dict[int, bool]) -> bool:
    """Whether a program has a primitive anywhere."""
    key = id(jaxpr)
    if key not in known:
        known[key] = any(eqn.primitive.name == name for eqn in jaxpr.eqns) or any(
            _has(inner, name, known) for eqn in jaxpr.eqns for inner in core.jaxprs_in_params(eqn.params)
        )
    return known[key]


def _left(what: str, arrays: str, missed: Iterable[tuple[core.JaxprEqn, Any, str]]) -> list[str]:
    """Say of each place where something is left as it is written, why, and what its arrays take."""
    places = Counter((line_of(eqn), why, aval.size * aval.dtype.itemsize) for eqn, aval, why in missed)
    return [
        f"{what} is left as it is written ({where}{'' if count == 1 else f', {count} times'}): {why}; "
        f"its {arrays} take {gib(size)} of the whole batch{'' if count == 1 else ' each'}"
        for (where, why, size), count in places.items()
    ]
