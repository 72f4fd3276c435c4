"""Biases of attention that are made of arrays of queries, of keys and of neither, as programs of these.

A bias is followed back as long as what it is made of has a number for each query and key. Where it comes from
arrays that have none, such as positions and a slope of each head, it can be worked out for any block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.extend import core

from ...ops.biases import KEYS, QUERIES, BiasOperand, BiasStep, Distance, Fixed, PlacedBias, Roles
from ..pointwise import SAME
from ..primitives import Trait, primitives
from .masks import Part, dtype_of
from .spans import KEY, ROW, NotThis, linear
from .values import Sources, moved, shape

_ELEMENTWISE = primitives(Trait.ELEMENTWISE)
_REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"))

# What distances are made with.
_LINEAR = frozenset(
    ("add", "sub", "neg", "mul", "broadcast_in_dim", "reshape", "squeeze", "transpose", *SAME)
)

# Queries that XLA scores at once by itself: what is looked up for each of their scores is so once, and not
# again in each layer.
_SHORT = 4096

_ARRAY = "its bias is an array of all queries and keys"


class FoundBias(NamedTuple):
    """A bias as a program, and where its operands come from: an atom, or numbers from 0 on of a type."""

    bias: PlacedBias
    operands: tuple[Any, ...]

    @property
    def counted(self) -> tuple[tuple[str, int] | None, ...]:
        """Of each operand, the type of numbers from 0 on and how many; None of one that is an atom."""
        return tuple((str(o.dtype), o.size) if isinstance(o, Counted) else None for o in self.operands)

    @property
    def given(self) -> list[Any]:
        """The atoms among the operands."""
        return [one for one in self.operands if not isinstance(one, Counted)]


class Counted(NamedTuple):
    """The numbers of all queries, or of all keys, from 0 on."""

    dtype: Any
    size: int


def placed_bias(
    values: Sources, parts: Sequence[Part], sizes: Mapping[str, int], role: Callable[[Sequence[int]], Any]
) -> FoundBias:
    """Return what `parts` add to scores of these `sizes`, as a program.

    `role` tells of labels that one dimension has what it is of scores.

    Raises:
      NotThis: some array has a number for each query and key, and cannot be made of others.
    """
    program = _BiasProgram(values, sizes)
    sums = []
    for part in parts:
        found = program.value(part.atom, tuple(role(dim) for dim in part.labels))
        if isinstance(found, Fixed):
            raise NotThis("it is one number")
        sums.append((found, part.fill))
    return program.found(sums)


class _BiasProgram:
    """The steps that a bias is made in, numbered from 0; operands are -1, -2, … until all are known."""

    def __init__(self, values: Sources, sizes: Mapping[str, int]) -> None:
        self._values = values
        self._sizes = sizes
        self._operands: list[tuple[BiasOperand, Any]] = []
        self._steps: list[BiasStep] = []
        self._known: dict[Any, int] = {}
        self._places: tuple[int, int] | None = None
        self._looks_up = False

    def found(self, sums: Sequence[tuple[int, float]]) -> FoundBias:
        """Return the program, its values numbered from the operands on."""
        count = len(self._operands)

        def placed(number: int) -> int:
            return -1 - number if number < 0 else count + number

        steps = (
            dataclasses.replace(
                one, inputs=tuple(x if isinstance(x, Fixed) else placed(x) for x in one.inputs)
            )
            for one in self._steps
        )
        of_rows = [-1 - n for n, (one, _) in enumerate(self._operands) if one.along is not None]
        by_line = self._looks_up and sorted(of_rows) == sorted(self._places or ())
        if self._looks_up and not by_line and self._sizes[QUERIES] <= _SHORT:
            raise NotThis(_ARRAY)
        bias = PlacedBias(
            operands=tuple(one for one, _ in self._operands),
            steps=tuple(steps),
            sums=tuple((placed(number), by) for number, by in sums),
            places=None if self._places is None else (placed(self._places[0]), placed(self._places[1])),
            by_line=by_line,
        )
        return FoundBias(bias, tuple(source for _, source in self._operands))

    def value(self, atom: Any, roles: Roles) -> int | Fixed:
        """Return the number of what `atom` is, whose dimensions have these roles; raises NotThis."""
        atom = self._values.opening.outside(atom)
        if isinstance(atom, core.Literal) and shape(atom) == ():
            return Fixed(np.asarray(atom.val).item(), str(dtype_of(atom)))
        roles = tuple(() if size == 1 else dim for size, dim in zip(shape(atom), roles, strict=True))
        key = atom, roles
        if key not in self._known:
            there = {role for dim in roles for role in dim}
            whole = {QUERIES, KEYS} <= there
            self._known[key] = self._made(atom, roles) if whole else self._operand(roles, atom)
        return self._known[key]

    def _operand(self, roles: Roles, source: Any) -> int:
        single = all(len(dim) <= 1 for dim in roles)
        if not single or (not isinstance(source, Counted) and shape(source) != self._shape(roles, source)):
            raise NotThis(_ARRAY)
        self._operands.append((BiasOperand(roles), source))
        return -len(self._operands)

    def _shape(self, roles: Roles, atom: Any) -> tuple[int, ...]:
        """Return the shape of an atom as its roles tell it."""
        return tuple(
            math.prod(self._sizes[role] for role in dim) if dim else own
            for dim, own in zip(roles, shape(atom), strict=True)
        )

    def _made(self, atom: Any, roles: Roles) -> int:
        eqn = self._values.made(atom)
        if eqn is None or shape(atom) != self._shape(roles, atom):
            raise NotThis(_ARRAY)
        name = eqn.primitive.name
        if (distance := self._distance(atom, roles)) is not None:
            return self._step(distance, {"dtype": str(dtype_of(atom))}, (), roles, shape(atom))
        if name in SAME and name != "convert_element_type":
            found = self.value(eqn.invars[0], roles)
            assert isinstance(found, int)
            return found
        if name == "iota":
            return self._counted(eqn, roles)
        read = _RULES.get(name) or (_elementwise if name in _ELEMENTWISE else None)
        before = None if read is None else read(self, eqn, roles)
        if before is None:
            raise NotThis(_ARRAY)
        self._looks_up |= name in ("gather", "dot_general") or name in _REDUCTIONS
        inputs = (self.value(one, own) for one, own in zip(eqn.invars, before, strict=True))
        return self._step(eqn.primitive, eqn.params, tuple(inputs), roles, shape(atom))

    def _distance(self, atom: Any, roles: Roles) -> Distance | None:
        """Return how an atom is the distance of a query and a key, None if it is anything else."""
        eqn = self._values.made(atom)
        if eqn is None or eqn.primitive.name not in _LINEAR:
            return None
        along: dict[Roles, Any] = {((QUERIES,),): ROW, ((KEYS,),): KEY, ((),): 0}
        found = linear(self._values, atom, [along.get((dim,)) for dim in roles])
        if found is None or abs(found[0]) != 1 or found[1] != -found[0] or found[2] != int(found[2]):
            return None
        if self._places is None:
            self._places = (
                self._operand(((QUERIES,),), Counted("int32", self._sizes[QUERIES])),
                self._operand(((KEYS,),), Counted("int32", self._sizes[KEYS])),
            )
        return Distance(int(found[0]), int(found[2]))

    def _counted(self, eqn: core.JaxprEqn, roles: Roles) -> int:
        along = eqn.params["dimension"]
        whole = shape(eqn.outvars[0])
        counted = self._operand((roles[along],), Counted(eqn.params["dtype"], whole[along]))
        params = {"shape": whole, "broadcast_dimensions": (along,), "sharding": None}
        return self._step(lax.broadcast_in_dim_p, params, (counted,), roles, whole)

    def _step(self, primitive: Any, params: Any, inputs: Any, roles: Roles, whole: tuple[int, ...]) -> int:
        self._steps.append(BiasStep(primitive, params, inputs, roles, whole))
        return len(self._steps) - 1

    def regrouped(self, roles: Roles, after: Sequence[int], before: Sequence[int]) -> Roles | None:
        """Return the roles of what a reshape makes `after` of, of shape `before`; None if it cuts one."""
        found: list[tuple[str, ...]] = []
        left = [(size, dim) for size, dim in zip(after, roles, strict=True) if size > 1]
        for size in before:
            taken: list[tuple[int, tuple[str, ...]]] = []
            while math.prod(one for one, _ in taken) < size:
                if not left:
                    return None
                taken.append(left.pop(0))
            if math.prod(one for one, _ in taken) != size:
                # One dimension that is taken apart, into roles of its own.
                if len(taken) != 1 or not taken[0][1]:
                    return None
                first, *rest = taken[0][1]
                if self._sizes[first] != size or not rest:
                    return None
                left.insert(0, (taken[0][0] // size, tuple(rest)))
                taken = [(size, (first,))]
            some = [dim for _, dim in taken]
            if len(some) > 1 and not all(some) and any(some):
                return None
            found.append(tuple(role for dim in some for role in dim))
        return tuple(found) if not left else None


def _elementwise(program: _BiasProgram, eqn: core.JaxprEqn, roles: Roles) -> list[Roles]:
    del program
    return [roles if len(shape(one)) == len(roles) else () for one in eqn.invars]


def _laid(program: _BiasProgram, eqn: core.JaxprEqn, roles: Roles) -> list[Roles]:
    del program
    found = moved(eqn, roles, ())
    assert found is not None
    return [tuple(found)]


def _reshaped(program: _BiasProgram, eqn: core.JaxprEqn, roles: Roles) -> list[Roles] | None:
    found = program.regrouped(roles, shape(eqn.outvars[0]), shape(eqn.invars[0]))
    return None if found is None else [found]


def _sliced(program: _BiasProgram, eqn: core.JaxprEqn, roles: Roles) -> list[Roles] | None:
    del program
    before, after = shape(eqn.invars[0]), shape(eqn.outvars[0])
    cut = any(dim and size != own for dim, size, own in zip(roles, before, after, strict=True))
    return None if cut else [roles]


def _joined(program: _BiasProgram, eqn: core.JaxprEqn, roles: Roles) -> list[Roles] | None:
    del program
    return None if roles[eqn.params["dimension"]] else [roles for _ in eqn.invars]


def _reduced(program: _BiasProgram, eqn: core.JaxprEqn, roles: Roles) -> list[Roles]:
    del program
    kept = iter(roles)
    axes = eqn.params["axes"]
    return [tuple(() if d in axes else next(kept) for d in range(len(shape(eqn.invars[0]))))]


def _multiplied(program: _BiasProgram, eqn: core.JaxprEqn, roles: Roles) -> list[Roles]:
    """Return the roles of a product's operands: what is summed over has none."""
    del program
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    found, free = [], len(left_batch)
    for atom, summed, batch in zip(eqn.invars, (left, right), (left_batch, right_batch), strict=True):
        own: list[tuple[str, ...]] = [()] * len(shape(atom))
        for n, d in enumerate(batch):
            own[d] = roles[n]
        for d in (d for d in range(len(own)) if d not in (*summed, *batch)):
            own[d] = roles[free]
            free += 1
        found.append(tuple(own))
    return found


def _looked_up(program: _BiasProgram, eqn: core.JaxprEqn, roles: Roles) -> list[Roles] | None:
    """Return the roles of a table, in whose rows there are others, and of indices."""
    del program
    numbers, table = eqn.params["dimension_numbers"], shape(eqn.invars[0])
    each = [dim for n, dim in enumerate(roles) if n not in numbers.offset_dims]
    offsets = iter(roles[n] for n in numbers.offset_dims)
    shared = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    found: list[tuple[str, ...]] = []
    for d, (size, taken) in enumerate(zip(table, eqn.params["slice_sizes"], strict=True)):
        own = () if d in numbers.collapsed_slice_dims else each[shared[d]] if d in shared else next(offsets)
        if own and d not in shared and size != taken:
            return None
        found.append(own)
    return [tuple(found), (*each, ())]


_Rule = Callable[[_BiasProgram, core.JaxprEqn, Roles], Sequence[Roles] | None]
_RULES: Mapping[str, _Rule] = {
    "broadcast_in_dim": _laid,
    "concatenate": _joined,
    "dot_general": _multiplied,
    "gather": _looked_up,
    "reshape": _reshaped,
    "slice": _sliced,
    "squeeze": _laid,
    "transpose": _laid,
    **dict.fromkeys(_REDUCTIONS, _reduced),
}
