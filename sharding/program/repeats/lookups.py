"""Lookups of layers by number: whole numbers that values are in each turn of a loop, and what they pick."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.extend import core

from ..pointwise import POINTWISE, SAME, Untold

# What a value of one element is in each turn of a loop, int64 [turns].
Turns = np.ndarray

# What gives the one element on in another shape.
_LAID = frozenset({"broadcast_in_dim", "squeeze", "reshape"})


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class TakenLayers:
    """Which layers the turns of a loop take, one each."""

    turns: tuple[int, ...]

    @property
    def is_once(self) -> bool:
        """Whether no layer is taken twice."""
        return len(set(self.turns)) == len(self.turns)

    def of(self, stack: Any) -> Any:
        """Return those layers of a stack, itself where they are all of it in its order."""
        low, end = min(self.turns), max(self.turns) + 1
        strides = {*np.diff(self.turns).tolist()}
        if len(strides) > 1 or 0 in strides:
            # Slices: a look-up of rows is shared out over devices as that of a table is.
            return lax.concatenate([lax.slice_in_dim(stack, n, n + 1, axis=0) for n in self.turns], 0)
        stride = strides.pop() if strides else 1
        if (low, abs(stride), end) != (0, 1, stack.shape[0]):
            stack = lax.slice_in_dim(stack, low, end, abs(stride), axis=0)
        return stack if stride > 0 else lax.rev(stack, [0])


def evaluated(eqn: core.JaxprEqn, ins: Sequence[Turns | None]) -> Turns | None:
    """Return what the one result of an equation is in each turn, of operands that are so known."""
    if not ins or any(one is None for one in ins):
        return None
    out: Any = eqn.outvars[0].aval
    if out.size != 1 or out.dtype.kind not in "ib":
        return None
    name = eqn.primitive.name
    # Truth values are 0 and 1 in each turn, of which `not` is another number.
    given = [one != 0 if _is_truth(atom) else one for atom, one in zip(eqn.invars, ins, strict=True)]
    evaluate = (lambda one: one) if name in SAME or name in _LAID else POINTWISE.get(name)
    if evaluate is None:
        return None
    try:
        found = evaluate(*given)
    except Untold:
        return None
    found = np.asarray(found).astype(np.int64)
    if out.dtype.kind == "b":
        return (found != 0).astype(np.int64)
    return found if fit(found, out.dtype) else None


def _is_truth(atom: Any) -> bool:
    return atom.aval.dtype == np.bool_


def fit(turns: Turns, dtype: Any) -> bool:
    """Whether whole numbers are the same in a type: what would not fit is another number in the program."""
    limits = np.iinfo(dtype)
    return bool(limits.min <= turns.min() and turns.max() <= limits.max)


def steps_of(eqn: core.JaxprEqn, ins: Sequence[Turns | None]) -> TakenLayers | None:
    """Return which layers an equation takes of its first operand in each turn, whole and one a turn.

    It is a slice at a number, or a row looked up by one; None if it is anything else.
    """
    if eqn.primitive.name not in ("dynamic_slice", "gather") or ins[1] is None:
        return None
    stack: Any = eqn.invars[0].aval
    at: Any = eqn.invars[1].aval
    shape, sizes = tuple(stack.shape), tuple(eqn.params["slice_sizes"])
    if sizes != (1, *shape[1:]):
        return None
    if eqn.primitive.name == "gather":
        numbers, own = eqn.params["dimension_numbers"], tuple(range(len(shape) - 1))
        picks = (numbers.offset_dims, numbers.collapsed_slice_dims, numbers.start_index_map)
        beside = (*numbers.operand_batching_dims, *numbers.start_indices_batching_dims)
        if picks != (own, (0,), (0,)) or beside or at.shape != (1,):
            return None
    turns = TakenLayers(turns=tuple(ins[1].tolist()))
    within = min(turns.turns) >= 0 and max(turns.turns) < shape[0]
    return turns if within and turns.is_once else None
