"""What `trace` returns: a program's equations over named dimensions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend import core

from .identity import fingerprint
from .lines import is_ours, line_of
from .op_rules.rule import Kind

# The named dimensions of an array: for each array dimension the ids of the dims it consists of, major to
# minor; empty where the size is 1.
Dims = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conflict:
    """A dim that meets itself in one array, so that only one of its places can be sharded by it.

    `equation` is the index of the equation whose result the array is, None for an argument; `places` are
    the array dimensions.
    """

    dim: int
    equation: int | None
    array: str
    shape: tuple[int, ...]
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a dim stands among the arguments: factor number `part` of array dimension `dimension`."""

    argument: int
    path: str
    dimension: int
    part: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dim:
    """A set of array dimensions, or factors of them, that are sharded alike.

    `labels` are what the user's names say of it, best first; `name` is one of them or made up, and unique.
    Dims of one `family` have different sizes but come from each other by slicing, padding, joining or
    windows, so one would rather shard them alike.

    contracted: somewhere it is summed over, so that sharding it leaves partial results to reduce.
    scanned:    a loop walks it one step after another.
    stacked:    it is scanned and parameters have it: a model's layers.
    batch_like: the data have it and no parameter does.
    whole:      why it must not be sharded, or None.
    whole_at:   indices of the equations that need it whole on each device; it can be sharded elsewhere.
    """

    id: int
    name: str
    size: int
    labels: tuple[str, ...]
    family: int
    places: tuple[Place, ...]
    contracted: bool
    scanned: bool
    stacked: bool
    batch_like: bool
    whole: str | None
    whole_at: tuple[int, ...]
    conflicts: tuple[Conflict, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """A dimension of one equation's iteration space, as in an einsum.

    `ins` and `outs` are the (operand, array dimension) and (result, array dimension) places it stands in;
    `dims` the named dimensions it consists of, major to minor. Two factors of one equation may be the same
    dim: a conflict (the queries' and the keys' sequence).
    """

    kind: Kind
    size: int
    dims: tuple[int, ...]
    ins: tuple[tuple[int, int], ...]
    outs: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Equation:
    """One equation: its factors, the dims of its operands and results, and the scopes it runs.

    index:        its place in the order of the whole program, scopes included.
    trips:        how often each run of it runs its scopes: 1 unless it is a loop, None when not known.
    multiplicity: how often the program runs it, the product of the trips around it; a loop of unknown
                  length counts once and `counted` is False.
    """

    index: int
    primitive: str
    eqn: core.JaxprEqn
    factors: tuple[Factor, ...]
    ins: tuple[Dims, ...]
    outs: tuple[Dims, ...]
    scopes: tuple[Scope, ...]
    trips: int | None
    multiplicity: int
    counted: bool

    @property
    def where(self) -> str:
        """The user's source line that wrote it: ``file.py:12 (function)``."""
        return line_of(self.eqn)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scope:
    """A jaxpr at one place it is called from, with the dims that each variable has there.

    Nested as the equations are (`Equation.scopes`), so that a transformation can re-evaluate the jaxpr
    beside it. One jaxpr called twice has two scopes.
    """

    jaxpr: core.Jaxpr
    dims: Mapping[core.Var, Dims]
    equations: tuple[Equation, ...]

    def dims_of(self, atom: Any) -> Dims:
        """Return the dims of a variable of this scope, or of a literal, which has none."""
        if isinstance(atom, core.Literal):
            return ((),) * len(getattr(atom.aval, "shape", ()))
        return self.dims[atom]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Argument:
    """A leaf of the function's arguments: `position` is which argument, `path` where in it.

    `names` are the user's names of its dimensions, None where there is none. `is_trained` says whether its
    gradient is taken. `is_state` is what a step reads and writes beside the parameters.
    """

    index: int
    position: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    dims: Dims
    names: tuple[str | None, ...]
    is_parameter: bool
    is_trained: bool = False
    is_state: bool = False

    @property
    def is_data(self) -> bool:
        """Whether it comes with each batch."""
        return not (self.is_parameter or self.is_state)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Parameters that the program stacks for a scan over layers, or takes layers of, by argument index.

    `path` is what their paths have in common, `dim` the layers' own dim, `item_bytes` those of an element of
    the stack, which may be cast.
    """

    arguments: tuple[int, ...]
    path: str
    dim: int
    item_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A leaf of what the function returns."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    dims: Dims


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """A primitive without a rule: its arrays stay whole around it. `where` is the first place."""

    primitive: str
    count: int
    where: str

    @property
    def note(self) -> str:
        """What a plan's notes say of it."""
        times = "" if self.count == 1 else f", {self.count} times"
        return (
            f"{self.primitive} has no rule ({self.where}{times}): its arrays lie whole on every device; "
            "meshwright.sharding.program.register_op_rule gives it one"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """An array that a function reads from outside: a constant of its program. `where` reads it first."""

    shape: tuple[int, ...]
    dtype: Any
    where: str

    @property
    def bytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A traced function over named dimensions.

    `arguments` and `results` are in the order of `jaxpr.in_avals` and `out_avals`. `families` are the ids
    of the dims of each family. `batch_dims` are the dims that most arrays of the data lead with, major to
    minor. `written` is the jaxpr of what the user wrote, `jaxpr` is that with what was recognised
    rewritten, and `notes` say what that was. `stacks` are the parameters that are stacked for a scan.
    """

    jaxpr: core.ClosedJaxpr
    written: core.ClosedJaxpr
    scope: Scope
    dims: tuple[Dim, ...]
    families: tuple[tuple[int, ...], ...]
    arguments: tuple[Argument, ...]
    results: tuple[Result, ...]
    batch_dims: tuple[int, ...]
    conflicts: tuple[Conflict, ...]
    unknown: tuple[Unknown, ...]
    notes: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()

    def equations(self) -> Iterator[Equation]:
        """Walk every equation in program order, a call before what it runs."""
        return walk_equations(self.scope)

    def located(self) -> Iterator[tuple[Equation, str]]:
        """Walk every equation with the user's source line, that of the call around it where it has none."""
        return _located(self.scope, "")

    @functools.cached_property
    def captured(self) -> tuple[Captured, ...]:
        """The arrays that the function reads from outside, largest first."""
        found: dict[int, Captured] = {}
        for scope, consts, where in _holding_constants(self.scope, self.jaxpr.consts, ""):
            uses = {
                var: eqn for eqn in reversed(scope.jaxpr.eqns) for var in eqn.invars if type(var) is core.Var
            }
            for var, value in zip(scope.jaxpr.constvars, consts, strict=True):
                aval: Any = var.aval
                line = line_of(uses[var]) if var in uses else where
                found.setdefault(
                    id(value), Captured(shape=tuple(aval.shape), dtype=aval.dtype, where=line or where)
                )
        return tuple(sorted(found.values(), key=lambda one: -one.bytes))

    @functools.cached_property
    def data_dims(self) -> tuple[int, ...]:
        """The dims that lead any array of the data and are in no parameter."""
        taken = {d for a in self.parameters for composition in a.dims for d in composition}
        leading = (a.dims[0] for a in self.arguments if a.is_data and a.dims)
        return tuple(dict.fromkeys(d for composition in leading for d in composition if d not in taken))

    @functools.cached_property
    def alike(self) -> Mapping[int, int]:
        """The index of each parameter → that of the first that nothing tells from it but its numbers.

        Of one stack, or of the same shape and dims; both trained, or neither.
        """
        first: dict[object, int] = {}
        found = {}
        for one in self.parameters:
            stack = self.stack_of.get(one.index)
            kind = (one.shape, one.dims) if stack is None else stack.arguments[0]
            found[one.index] = first.setdefault((kind, one.is_trained), one.index)
        return found

    @functools.cached_property
    def state_like(self) -> Mapping[int, int | None]:
        """The index of each array of the state → that of the first parameter of its shape and dims."""
        first: dict[object, int] = {}
        for one in self.parameters:
            first.setdefault((one.shape, one.dims), one.index)
        return {one.index: first.get((one.shape, one.dims)) for one in self.stored if one.is_state}

    @functools.cached_property
    def unwalked(self) -> Mapping[int, tuple[int, ...]]:
        """The index of each stored argument → its dimensions of more than one place that no scan walks."""
        found = {}
        for one in self.stored:
            walked = [any(self.dims[dim].scanned for dim in composition) for composition in one.dims]
            found[one.index] = tuple(n for n, size in enumerate(one.shape) if size > 1 and not walked[n])
        return found

    @functools.cached_property
    def parameters(self) -> tuple[Argument, ...]:
        """The arguments that are parameters."""
        return tuple(argument for argument in self.arguments if argument.is_parameter)

    @functools.cached_property
    def majors(self) -> tuple[tuple[Argument, tuple[int, ...]], ...]:
        """The parameters, each with the major dims of its dimensions, which can be cut."""
        return tuple(
            (one, tuple(composition[0] for composition in one.dims if composition)) for one in self.parameters
        )

    @functools.cached_property
    def stored(self) -> tuple[Argument, ...]:
        """The arguments that lie on the devices from step to step: the parameters, then the state."""
        return tuple(argument for argument in self.arguments if not argument.is_data)

    @functools.cached_property
    def elements(self) -> int:
        """How many numbers the parameters are."""
        return sum(math.prod(argument.shape) for argument in self.parameters)

    @functools.cached_property
    def stack_of(self) -> Mapping[int, Stack]:
        """The stack that a parameter is part of, by argument index."""
        return {index: stack for stack in self.stacks for index in stack.arguments}

    @functools.cached_property
    def weights(self) -> tuple[tuple[Argument, ...], ...]:
        """What is stored as the program uses it: parameters that are stacked together, all others alone."""
        found: dict[int, list[Argument]] = {}
        for argument in self.stored:
            stack = self.stack_of.get(argument.index)
            found.setdefault(argument.index if stack is None else min(stack.arguments), []).append(argument)
        return tuple(tuple(found[index]) for index in sorted(found))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of what the user wrote, its structure, shapes and types: the same in every process."""
        return fingerprint(self.written)

    def labelled(self, label: str) -> tuple[tuple[int, ...], ...]:
        """Return the distinct compositions of the array dimensions that the user's names call `label`."""
        return tuple(
            dict.fromkeys(
                composition
                for argument in self.arguments
                for name, composition in zip(argument.names, argument.dims, strict=True)
                if name == label and composition
            )
        )


def _holding_constants(scope: Scope, consts: Any, where: str) -> Iterator[tuple[Scope, Any, str]]:
    """Walk the scopes that have constants, with these and the user's source line of what runs them."""
    if consts:
        yield scope, consts, where
    for equation in scope.equations:
        inner = equation.where or where
        for one in equation.scopes:
            held = next((c for c in _closed_in(equation.eqn) if c.jaxpr is one.jaxpr), None)
            yield from _holding_constants(one, held.consts if held is not None else (), inner)


def _closed_in(eqn: core.JaxprEqn) -> Iterator[core.ClosedJaxpr]:
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                yield one


def walk_equations(scope: Scope) -> Iterator[Equation]:
    """Walk the equations of `scope` and of the scopes within, in order."""
    for equation in scope.equations:
        yield equation
        for inner in equation.scopes:
            yield from walk_equations(inner)


def _located(scope: Scope, outer: str) -> Iterator[tuple[Equation, str]]:
    for equation in scope.equations:
        own = equation.where
        where = own if own and not (outer and is_ours(own)) else outer
        yield equation, where
        for inner in equation.scopes:
            yield from _located(inner, where)
