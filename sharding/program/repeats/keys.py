"""Equality of equations: two get one key exactly when they do the same on arrays of equal shapes and types.

Keys are interned structures, so that equal keys mean equal programs and nothing is left to a hash. Numbers
that a program writes are no part of a key: they are operands, and may differ from one layer to the next (its
index, a rate, a window). So they are inside of a checkpoint, too (`Keyed.literals`).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from typing import Any

import jax
import numpy as np
from jax.extend import core

from ..jaxpr import is_array, is_extended
from ..primitives import Trait, primitives

# Calls whose inner literals are operands: they can be run again from their program alone.
LIFTED = primitives(Trait.CHECKPOINT)
_PRODUCTS = primitives(Trait.PRODUCT)
# Larger arrays are compared by being the same object.
_COMPARED_ELEMENTS = 1 << 12
_PLAIN = (bool, int, float, str, bytes, enum.Enum, np.dtype, np.generic)
# Not part of what an equation computes.
_IGNORED_TYPES = frozenset({"DebugInfo", "Store", "EqualStore"})


@dataclasses.dataclass(eq=False, slots=True)
class Written:
    """A number that stands in the program itself."""

    value: Any
    aval: Any

    @property
    def name(self) -> Any:
        """What is equal for equal numbers; of an array, only for the same one."""
        if np.ndim(self.value):
            return "object", id(self.value)
        return "literal", np.asarray(self.value).tobytes(), str(self.aval)


@dataclasses.dataclass(frozen=True, slots=True)
class Keyed:
    """An equation's key, the literals inside of it where it is a lifted call, how many products it holds."""

    key: int
    literals: tuple[Written, ...]
    works: int


class Keys:
    """Interns what equations do."""

    def __init__(self) -> None:
        self._table: dict[Any, int] = {}
        self._jaxprs: dict[tuple[int, bool], tuple[Any, Keyed]] = {}
        # Objects that are compared by their ids are kept, so that these stay their own.
        self._alive: list[Any] = []

    def _intern(self, key: Any) -> int:
        return self._table.setdefault(key, len(self._table))

    def equation(self, eqn: core.JaxprEqn, lift: bool = False) -> Keyed:
        """Return what `eqn` does; with `lift` the literals in its programs are operands."""
        name = eqn.primitive.name
        lift = name in LIFTED or (lift and name == "jit")
        literals: list[Written] = []
        works = int(name in _PRODUCTS)
        params: list[Any] = []
        for word, value in eqn.params.items():
            if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
                inner = self._jaxpr(value, lift)
                works += inner.works
                literals += inner.literals
                params.append((word, inner.key))
            else:
                works += sum(
                    self._jaxpr(jaxpr, False).works for jaxpr in core.jaxprs_in_params({word: value})
                )
                params.append((word, self._value(value)))
        avals = tuple([_aval(v.aval) for v in eqn.invars]), tuple([_aval(v.aval) for v in eqn.outvars])
        key = self._intern((name, tuple(params), avals, bool(eqn.effects)))
        return Keyed(key, tuple(literals), works)

    def _jaxpr(self, jaxpr: Any, lift: bool) -> Keyed:
        known = self._jaxprs.get((id(jaxpr), lift))
        if known is not None:
            return known[1]
        # What a function closed over may be open, the constants beside it.
        is_closed = isinstance(jaxpr, core.ClosedJaxpr)
        program, held = (jaxpr.jaxpr, jaxpr.consts) if is_closed else (jaxpr, ())
        numbers: dict[Any, int] = {}
        literals: list[Written] = []
        works = 0

        def atom(one: Any) -> Any:
            if not isinstance(one, core.Literal):
                return numbers.setdefault(one, len(numbers))
            if lift:
                literals.append(Written(one.val, one.aval))
                return "literal", _aval(one.aval)
            return Written(one.val, one.aval).name

        heads = tuple([atom(v) for v in (*program.constvars, *program.invars)])
        body = []
        for eqn in program.eqns:
            inner = self.equation(eqn, lift)
            works += inner.works
            if lift:
                literals += inner.literals
                rest: Any = len(inner.literals)
            else:
                rest = tuple([one.name for one in inner.literals])
            body.append((inner.key, rest, tuple(map(atom, eqn.invars)), tuple(map(atom, eqn.outvars))))
        consts = tuple([self._value(c) for c in held])
        avals = tuple([_aval(v.aval) for v in (*program.constvars, *program.invars)])
        outs = tuple(map(atom, program.outvars))
        key = self._intern(("jaxpr", heads, avals, consts, tuple(body), outs))
        found = Keyed(key, tuple(literals), works)
        self._jaxprs[id(jaxpr), lift] = jaxpr, found
        return found

    def _value(self, value: Any) -> Any:
        """Return something hashable that is equal exactly for equal parameters of equations."""
        if value is None or isinstance(value, _PLAIN):
            return value
        if isinstance(value, (tuple, list)):
            return tuple([self._value(one) for one in value])
        if isinstance(value, dict):
            return tuple([(word, self._value(one)) for word, one in value.items()])
        if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
            return self._jaxpr(value, False).key
        if isinstance(value, functools.partial):
            return "partial", self._value(value.func), self._value(value.args), self._value(value.keywords)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, np.ndarray) or (is_array(value)):
            plain = not is_extended(value.dtype)
            if plain and value.size <= _COMPARED_ELEMENTS:
                return value.shape, str(value.dtype), np.asarray(value).tobytes()
            return self._identity(value)
        return self._object(value)

    def _object(self, value: Any) -> Any:
        kind = type(value).__name__
        if kind in _IGNORED_TYPES:
            return None
        if kind == "WrappedFun":
            # The function of a custom derivative, with what JAX puts around it.
            return "wrapped", self._value(value.f), tuple([self._around(one) for one in value.transforms])
        if kind == "Unhashable":
            return self._value(value.val)
        if isinstance(value, jax.Array) or type(value).__hash__ in (None, object.__hash__):
            return self._identity(value)
        try:
            hash(value)
        except TypeError:
            return self._identity(value)
        self._alive.append(value)
        return value

    def _around(self, transform: Any) -> Any:
        # What carries results out of a function that is being traced says nothing of what it does.
        kept = [
            one
            for one in transform[1]
            if not getattr(one, "__qualname__", "").startswith("transformation_with_aux")
        ]
        return getattr(transform[0], "__qualname__", ""), tuple([self._value(one) for one in kept])

    def _function(self, function: types.FunctionType) -> Any:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        try:
            if function.__qualname__ == "_memoize.<locals>.memoized":
                # JAX makes the rules of custom derivatives anew for each call: those of one user's function
                # are alike.
                inner = cells["fn"].cell_contents
                named = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
                users = [named[word].cell_contents for word in ("fwd", "jvp") if word in named]
                if not users:
                    return self._identity(function)
                return ("thunk", inner.__qualname__, *[self._value(one) for one in users])
            inside = tuple([self._value(cell.cell_contents) for cell in cells.values()])
        except (KeyError, ValueError, RecursionError):
            return self._identity(function)
        defaults = self._value(function.__defaults__), self._value(function.__kwdefaults__)
        return "function", function.__code__, inside, *defaults

    def _identity(self, value: Any) -> Any:
        self._alive.append(value)
        return "object", id(value)


def described(eqn: core.JaxprEqn) -> Any:
    """Return what two equations have in common that look alike: the primitive, shapes and types."""
    return eqn.primitive.name, tuple([_aval(v.aval) for v in (*eqn.invars, *eqn.outvars)])


def _aval(aval: Any) -> Any:
    return getattr(aval, "shape", None), getattr(aval, "dtype", aval)
