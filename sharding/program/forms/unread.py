"""Attention that no form reads: weights made of scores of queries and keys go into a product with values."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jax.extend import core

from ..jaxpr import call_body
from ..pointwise import SAME
from .attention import live
from .values import Sources, shape

# How many equations lie at most between scores and their exp, and from there to the product with values.
_FAR = 24
# What gives one number for each of those it is given.
_EACH = frozenset(
    ("mul", "div", "add", "sub", "select_n", "tanh", "max", "min", "pow", "integer_pow", "square")
) | {"transpose", "reshape", *SAME}
_CALLS = ("custom_jvp_call", "jit", "pjit")
_PRODUCTS = ("dot_general", "conv_general_dilated")
# Scores have a batch, heads, queries and keys where heads are mixed.
_RANK = 4

# What makes weights of scores, and what is said of it.
WEIGHS = {
    "exp": "its weights are not read as a softmax over keys",
    "logistic": "its weights are sigmoids of scores, which no kernel computes",
    "max": "its weights are scores cut at 0, which no kernel computes",
}


def unread(
    values: Sources, read: Collection[Any], products: Collection[core.JaxprEqn]
) -> Iterator[tuple[core.JaxprEqn, Any, str]]:
    """Yield the product with values, the shape of scores, and why it is left, of attention that was not read.

    Args:
      values: of the program.
      read: queries and keys of what was.
      products: those with values of what was read, or of which it is known why they were not.
    """
    for scope in values.opening.top.scopes():
        users: dict[Any, list[core.JaxprEqn]] = {}
        equations = live(scope)
        for eqn in equations:
            for atom in eqn.invars:
                if not isinstance(atom, core.Literal):
                    users.setdefault(atom, []).append(eqn)
        said: list[core.JaxprEqn] = []
        for eqn in equations:
            kind = _weighing(eqn)
            why = WEIGHS.get(kind)
            if why is None or (scores := _scores(values, eqn.invars[0])) is None:
                continue
            product = _product(users, eqn.outvars[0])
            if product is None or any(product is one for one in (*products, *said)):
                continue
            if kind != "exp" and not _of_data(values, scores, product):
                continue
            if not any(atom is one for atom in scores.invars for one in read):
                said.append(product)
                yield product, scores.outvars[0].aval, why


def _weighing(eqn: core.JaxprEqn) -> str:
    """Return the primitive of an equation, or the one that is all of its call (relu is one of its own)."""
    name = eqn.primitive.name
    while name in _CALLS:
        body = call_body(eqn)
        if body is None or len(body.eqns) != 1:
            break
        (eqn,) = body.eqns
        name = eqn.primitive.name
    return name


def _scores(values: Sources, atom: Any) -> core.JaxprEqn | None:
    """Return the product in batches that `atom` is worked out from number by number."""

    def each(eqn: core.JaxprEqn) -> list[Any]:
        size = _size(eqn.outvars[0])
        return [one for one in eqn.invars if _size(one) == size] if _gives_each(eqn) else []

    return next((eqn for eqn in _behind(values, atom, each) if _is_batched(eqn)), None)


def _behind(
    values: Sources, atom: Any, through: Callable[[core.JaxprEqn], Sequence[Any]]
) -> Iterator[core.JaxprEqn]:
    """Walk what `atom` is worked out from, of each equation what it reads that is gone `through`."""
    near, seen = [(atom, _FAR)], set()
    while near:
        atom, depth = near.pop()
        eqn = None if isinstance(atom, core.Literal) or depth == 0 else values.made(atom)
        if eqn is None or id(eqn) in seen:
            continue
        seen.add(id(eqn))
        yield eqn
        near += [(one, depth - 1) for one in through(eqn)]


def _product(users: dict[Any, list[core.JaxprEqn]], atom: Any) -> core.JaxprEqn | None:
    """Return the product in batches that reads `atom`, or what is worked out from it number by number."""
    near, seen = [(atom, _FAR)], set()
    while near:
        atom, depth = near.pop()
        for eqn in users.get(atom, ()) if depth else ():
            if _is_batched(eqn):
                return eqn
            if id(eqn) not in seen and _gives_each(eqn) and _size(eqn.outvars[0]) == _size(atom):
                seen.add(id(eqn))
                near.append((eqn.outvars[0], depth - 1))
    return None


def _of_data(values: Sources, scores: core.JaxprEqn, product: core.JaxprEqn) -> bool:
    """Whether no operand is a parameter as it is: products of experts, with what is between, look alike."""
    return all(_is_made(values, atom) for eqn in (scores, product) for atom in eqn.invars)


def _is_made(values: Sources, atom: Any) -> bool:
    """Whether there is a product or a convolution in what `atom` is worked out from."""
    return any(eqn.primitive.name in _PRODUCTS for eqn in _behind(values, atom, lambda eqn: eqn.invars))


def _gives_each(eqn: core.JaxprEqn) -> bool:
    return _weighing(eqn) in _EACH or _mixes_heads(eqn)


def _is_batched(eqn: core.JaxprEqn) -> bool:
    return eqn.primitive.name == "dot_general" and bool(eqn.params["dimension_numbers"][1][0])


def _mixes_heads(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name != "dot_general":
        return False
    return len(shape(eqn.outvars[0])) >= _RANK and any(
        _size(one) == _size(eqn.outvars[0]) for one in eqn.invars
    )


def _size(atom: Any) -> int:
    return math.prod(shape(atom))
