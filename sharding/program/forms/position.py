"""What losses over a vocabulary are written with, put as it is at each position.

A sum over positions and a vocabulary at once is taken over the vocabulary first. Entries that are picked by
the numbers of their positions (`logits[jnp.arange(n), targets]`) are picked at each position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.extend import core

from .losses import product_with_vocabulary
from .opened import Opened, Opening, inserted, shapes
from .values import shape


def by_position(opening: Opening, scope: Opened) -> None:
    """Put sums and picked entries so, in a scope that has logits."""
    sizes = set[int]()
    for eqn in scope.equations:
        side = product_with_vocabulary(eqn)
        if side is not None:
            sizes.add(shape(eqn.outvars[0])[-1 if side == 1 else 0])
    if not sizes:
        return
    makers = {var: eqn for eqn in scope.equations for var in eqn.outvars}
    laid: list[core.JaxprEqn] = []
    for eqn in scope.equations:
        made = None
        if not any(isinstance(atom, core.Literal) for atom in eqn.invars):
            if eqn.primitive.name == "gather":
                made = _picked(eqn, makers)
            elif eqn.primitive.name in ("reduce_sum", "dot_general"):
                made = _apart(eqn, sizes)
        put = [eqn] if made is None else inserted(made, eqn.invars, eqn)
        for one in put if made is not None else ():
            opening.home.update(dict.fromkeys(one.outvars, scope))
            opening.maker.update(dict.fromkeys(one.outvars, one))
        laid += put
    scope.equations[:] = laid


def _apart(eqn: core.JaxprEqn, sizes: set[int]) -> core.ClosedJaxpr | None:
    """Return a sum, or a product that sums all that its operands have, as sums one after another."""
    if eqn.primitive.name == "reduce_sum":
        axes = tuple(int(axis) for axis in eqn.params["axes"])
    else:
        (left, right), _ = eqn.params["dimension_numbers"]
        if shape(eqn.outvars[0]) or left != right:
            return None
        axes = tuple(left)
    over = [axis for axis in axes if shape(eqn.invars[0])[axis] in sizes]
    if len(over) != 1 or len(axes) < 2:
        return None
    rest = tuple(axis - (axis > over[0]) for axis in axes if axis != over[0])
    dtype = eqn.outvars[0].aval.dtype  # type: ignore[attr-defined]

    def summed(*values: Any) -> Any:
        wide = [one if one.dtype == dtype else jax.lax.convert_element_type(one, dtype) for one in values]
        value = wide[0] if len(wide) == 1 else wide[0] * wide[1]
        return jax.lax.reduce_sum(jax.lax.reduce_sum(value, [over[0]]), rest)

    return jax.make_jaxpr(summed)(*shapes(eqn.invars))


def _picked(eqn: core.JaxprEqn, makers: Mapping[Any, core.JaxprEqn]) -> core.ClosedJaxpr | None:
    """Return what picks one entry of the last dimension at each position, whose numbers are written out."""
    numbers, rank = eqn.params["dimension_numbers"], len(shape(eqn.invars[0]))
    every = tuple(range(rank))
    plain = tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == every
    if not plain or shape(eqn.outvars[0]) != shape(eqn.invars[0])[:-1]:
        return None
    joined = makers.get(eqn.invars[1])
    if joined is None or joined.primitive.name != "concatenate" or len(joined.invars) != rank:
        return None
    if joined.params["dimension"] != rank - 1:
        return None
    if any(_counted(atom, makers) != d for d, atom in enumerate(joined.invars[:-1])):
        return None

    def along(values: Any, indices: Any) -> Any:
        rows = tuple(range(rank - 1))
        return jax.lax.gather(
            values,
            indices[..., -1:],
            jax.lax.GatherDimensionNumbers(
                offset_dims=(),
                collapsed_slice_dims=(rank - 1,),
                start_index_map=(rank - 1,),
                operand_batching_dims=rows,
                start_indices_batching_dims=rows,
            ),
            slice_sizes=(1,) * rank,
            mode=eqn.params["mode"],
            fill_value=eqn.params["fill_value"],
        )

    return jax.make_jaxpr(along)(*shapes(eqn.invars))


def _counted(atom: Any, makers: Mapping[Any, core.JaxprEqn]) -> int | None:
    """Return the dimension along which an array is 0, 1, 2, …, alike along all others; None if it is not."""
    eqn = None if isinstance(atom, core.Literal) else makers.get(atom)
    if eqn is None:
        return None
    name = eqn.primitive.name
    if name == "iota":
        return eqn.params["dimension"]
    if name == "select_n":
        # Numbers below 0 count from the end: there are none.
        test, kept = makers.get(eqn.invars[0]), eqn.invars[1]
        below = test is not None and test.primitive.name == "lt" and test.invars[0] is kept
        zero = below and isinstance(test.invars[1], core.Literal) and test.invars[1].val == 0  # type: ignore[union-attr]
        return _counted(kept, makers) if zero else None
    if name not in ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type"):
        return None
    d = _counted(eqn.invars[0], makers)
    before, after = shape(eqn.invars[0]), shape(eqn.outvars[0])
    if d is None or name == "convert_element_type":
        return d
    if name == "broadcast_in_dim":
        to = eqn.params["broadcast_dimensions"][d]
        return to if after[to] == before[d] else None
    long = [n for n, size in enumerate(after) if size > 1]
    if before[d] == 1 or [before[n] for n in range(len(before)) if before[n] > 1] != [after[n] for n in long]:
        return None
    return long[sum(size > 1 for size in before[:d])]
