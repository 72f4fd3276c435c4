"""Stacks that loops over layers walk a part of, or in another order: parameters all the same.

``jax.lax.scan(layer, x, jax.tree.map(lambda w: w[:6], params))`` walks what is made of a stacked parameter,
and so does a loop over every second layer, or over layers in another order. The scan's dimension is not the
parameter's; here is which parameters its layers are of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core

from .jaxpr import scan_parts
from .layers import is_layer_scan
from .primitives import Trait, primitives
from .program import Argument, Equation, Scope, Stack
from .stacks import is_stack, path_of_stack

_OTHER = frozenset[int]()
# What gives rows of its first operand, or all of them in another order, besides views.
_MOVES = primitives(Trait.VIEW) | primitives(Trait.PICKING) | {"slice", "rev", "concatenate", "name"}


def taken_of(scope: Scope, arguments: Sequence[Argument], stacks: Sequence[Stack]) -> tuple[Stack, ...]:
    """Return the parameters of which a program's loops walk some layers, but those in `stacks`.

    One that several loops walk parts of is of the first of them.
    """
    parameters = [argument for argument in arguments if argument.is_parameter]
    own = {dim for argument in parameters for composition in argument.dims for dim in composition}
    origins = {
        var: frozenset((argument.index,)) if argument.is_parameter else _OTHER
        for var, argument in zip(scope.jaxpr.invars, arguments, strict=True)
    }
    known = {index for stack in stacks for index in stack.arguments}
    found: list[Stack] = []
    for members, dim, item_bytes in _walked(scope, origins):
        if dim in own or known & members:
            continue
        known |= members
        path = path_of_stack([arguments[index].path for index in sorted(members)])
        found.append(Stack(arguments=tuple(sorted(members)), path=path, dim=dim, item_bytes=item_bytes))
    return tuple(found)


def _walked(scope: Scope, origins: dict[Any, frozenset[int]]) -> Iterator[tuple[frozenset[int], int, int]]:
    """Yield of which parameters layers are that a loop walks, their dim, and the bytes of an element.

    `origins` are the parameters that values are made of by moving rows alone, none of what depends on
    arguments otherwise; what is made of none is not there.
    """
    for equation in scope.equations:
        eqn = equation.eqn
        given = [None if isinstance(atom, core.Literal) else origins.get(atom) for atom in eqn.invars]
        if is_layer_scan(eqn):
            yield from _of_scan(equation, given)
        elif equation.scopes and not is_stack(eqn) and len(equation.scopes[0].jaxpr.invars) == len(given):
            inner = equation.scopes[0]
            pairs = zip(inner.jaxpr.invars, given, strict=True)
            within = {var: one for var, one in pairs if one is not None}
            yield from _walked(inner, within)
            for var, atom in zip(eqn.outvars, inner.jaxpr.outvars, strict=False):
                if not isinstance(atom, core.Literal) and atom in within:
                    origins[var] = within[atom]
            continue
        moved = given if is_stack(eqn) or equation.primitive == "concatenate" else given[:1]
        moves = (is_stack(eqn) or equation.primitive in _MOVES) and all(moved)
        if moves and all(one is None for one in given[len(moved) :]):
            origins[eqn.outvars[0]] = frozenset[int]().union(*(one for one in moved if one is not None))
        elif any(one is not None for one in given):
            origins.update(dict.fromkeys(eqn.outvars, _OTHER))


def _of_scan(
    equation: Equation, given: Sequence[frozenset[int] | None]
) -> Iterator[tuple[frozenset[int], int, int]]:
    eqn = equation.eqn
    first = len(eqn.invars) - scan_parts(eqn).num_xs
    for n in range(first, len(eqn.invars)):
        members, dims, aval = given[n], equation.ins[n], eqn.invars[n].aval
        if members and dims[0]:
            yield members, dims[0][0], int(aval.dtype.itemsize)  # type: ignore[attr-defined]
