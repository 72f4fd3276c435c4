"""A program without its scopes: calls and loops opened up, arrays numbered, views of parameters known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from ..ops.experts import experts_call, slots_of_outline
from ..program.aside import aside
from ..program.flops import work
from ..program.jaxpr import scan_parts, while_parts
from ..program.layers import layer_scans
from ..program.primitives import Trait, primitives
from ..program.program import Dims, Equation, Program, Scope, walk_equations
from ..program.stacks import is_stack

# Where an equation stands towards the scan over layers, for pipeline stages.
BEFORE, LAYERS, AFTER = 0, 1, 2

_CHECKPOINTS = primitives(Trait.CHECKPOINT)


@dataclasses.dataclass(slots=True)
class Value:
    """An array of the program: bytes for one run, dims, and what it comes from.

    `width` is the length of rows that stay rows, a head's in an array of four or more axes; 0 of others.
    `parameter` is the index of the argument that it is a view of (a cast, a layer's slice), or -1; `source`
    the value that it stands for inside or outside of a loop, or -1; `call` the kernel that it is inside of,
    or -1; `stack` the scan over layers that it is inside of, or -1; `slots` says that its rows are those of
    experts, as many as an even router gives each.
    """

    bytes: float
    item_bytes: int
    elements: float
    dims: tuple[int, ...]
    grad: bool
    parameter: int = -1
    trips: int = 1
    section: int = BEFORE
    producer: int = -1
    source: int = -1
    core: bool = False
    call: int = -1
    width: int = 0
    stack: int = -1
    slots: bool = False


@dataclasses.dataclass(slots=True)
class FlatOp:
    """An equation that runs no scope, with what it reads and writes, its kernel and its loop over layers.

    `grouped` says that it is of a call of `ops.experts`.
    """

    equation: Equation
    ins: list[int]
    outs: list[int]
    section: int
    runs: int
    rematted: bool
    call: int = -1
    stack: int = -1
    grouped: bool = False


class FusedCall(NamedTuple):
    """A call of attention that is one kernel: the values that it reads and gives, its equation, its runs."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    equation: int
    runs: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Flat:
    """A program without scopes: `carries` are what the main scan over layers hands on, `inputs` the data.

    The main scan does most work: `layers` and `layer_dim` are its, `main` is its place among the `stacks`
    scans over layers as they run. `streams` are what all of them hand on, `counts` the layers of each and
    `through` what travels through each: what it hands on, and what of its constants has a gradient. `calls`
    are the values that each kernel of attention reads, and those it writes for its gradient to read. `own`
    are functions with gradients of their own: the values that each reads, and the ops that it is made of.
    """

    values: list[Value]
    ops: list[FlatOp]
    carries: tuple[int, ...]
    streams: tuple[int, ...]
    inputs: tuple[int, ...]
    layers: int
    layer_dim: int
    main: int = 0
    stacks: int = 1
    counts: tuple[int, ...] = (1,)
    through: tuple[tuple[int, ...], ...] = ((),)
    calls: tuple[FusedCall, ...] = ()
    own: tuple[tuple[tuple[int, ...], range], ...] = ()


class _Flattener:
    """Flattens the scopes of a program into ops over numbered values."""

    def __init__(self, program: Program, kernels: frozenset[int]) -> None:
        self.program = program
        self.calls: list[FusedCall] = []
        self.own: list[tuple[tuple[int, ...], range]] = []
        self._kernels = kernels
        self._call = -1
        # Experts and their rows, within a call of `ops.experts`.
        self._slots: tuple[int, int] | None = None
        self.values: list[Value] = []
        self.ops: list[FlatOp] = []
        self.carries: list[int] = []
        self.streams: list[int] = []
        self.inputs: list[int] = []
        self.layers = 1
        self.layer_dim = -1
        self._main = _main_scan(program)
        self._stacks = _scans_over_layers(program, self._main)
        self.main = self._stacks.index(self._main)
        self.counts = [1] * len(self._stacks)
        self.through: list[tuple[int, ...]] = [()] * len(self._stacks)
        self._aside = aside(program).equations
        self._section, self._stack_of_layers = BEFORE, -1

    @property
    def stacks(self) -> int:
        return len(self._stacks)

    def read(self) -> None:
        env: dict[Any, int] = {}
        for argument, var in zip(self.program.arguments, self.program.jaxpr.jaxpr.invars, strict=True):
            env[var] = self.value(var, argument.dims, argument.is_trained)
            if argument.is_data:
                self.inputs.append(env[var])
            else:
                # What is stacked is one parameter, wherever it is used.
                stack = self.program.stack_of.get(argument.index)
                first = argument.index if stack is None else min(stack.arguments)
                self.values[env[var]].parameter = first
        self.scope(self.program.scope, env, 1, False)

    def value(self, var: Any, dims: Dims, grad: bool, runs: int = 1) -> int:
        shape = getattr(var.aval, "shape", ())
        elements = float(math.prod(shape))
        size = _item_bytes(getattr(var.aval, "dtype", None))
        flat = tuple(dict.fromkeys(d for composition in dims for d in composition))
        self.values.append(
            Value(
                bytes=elements * size,
                item_bytes=size,
                elements=elements,
                dims=flat,
                grad=grad,
                trips=runs,
                section=self._section,
                core=len(flat) != sum(len(composition) for composition in dims)
                and (self._call >= 0 or not self._kernels),
                call=self._call,
                width=shape[-1] if len(shape) >= 4 else 0,
                stack=self._stack_of_layers,
                slots=self._slots is not None and len(shape) == 4 and {*self._slots} <= {*shape[:3]},
            )
        )
        return len(self.values) - 1

    def scope(self, scope: Scope, env: dict[Any, int], runs: int, rematted: bool) -> list[int]:
        for var in scope.jaxpr.constvars:
            env[var] = self.value(var, scope.dims_of(var), False, runs)
        for equation in scope.equations:
            ins = [self._atom(atom, env, runs) for atom in equation.eqn.invars]
            outs = self._equation(equation, ins, runs, rematted)
            env.update(zip(equation.eqn.outvars, outs, strict=True))
        return [self._atom(atom, env, runs) for atom in scope.jaxpr.outvars]

    def _atom(self, atom: Any, env: dict[Any, int], runs: int) -> int:
        if isinstance(atom, core.Literal):
            return self.value(atom, (), False, runs)
        return env[atom]

    def _equation(self, equation: Equation, ins: list[int], runs: int, rematted: bool) -> list[int]:
        name = equation.primitive
        if not equation.scopes:
            return self._op(equation, ins, runs, rematted)
        if is_stack(equation.eqn):
            return self._stack(equation, ins, runs)
        if equation.index in self._kernels:
            return self._attention(equation, ins, runs)
        if experts_call(equation.eqn) is not None and self._slots is None:
            self._slots = slots_of_outline(*(getattr(atom.aval, "shape", ()) for atom in equation.eqn.invars))
            outs = self._equation(equation, ins, runs, rematted)
            self._slots = None
            return outs
        if name == "scan":
            return self._scan(equation, ins, runs, rematted)
        if name == "while":
            return self._while(equation, ins, runs, rematted)
        if name == "cond":
            arms = [
                self.scope(
                    scope,
                    dict(zip(scope.jaxpr.invars, ins[1:], strict=True)),
                    runs if n == 0 else 0,
                    rematted,
                )
                for n, scope in enumerate(_heaviest_first(equation))
            ]
            return arms[0]
        inner = equation.scopes[0]
        # What plain attention runs again for its gradient, a kernel's gradient has in it.
        checkpointed = rematted or (name in _CHECKPOINTS and self._call < 0)
        first = len(self.ops)
        outs = self.scope(inner, dict(zip(inner.jaxpr.invars, ins, strict=True)), runs, checkpointed)
        if name == "custom_jvp_call":
            self.own.append((tuple(ins), range(first, len(self.ops))))
        return outs

    def _stack(self, equation: Equation, ins: list[int], runs: int) -> list[int]:
        """Read what is stacked; of parameters what that takes is priced with them, as they are stored."""
        if any(self.values[i].parameter not in self.program.stack_of for i in ins):
            inner = equation.scopes[0]
            return self.scope(inner, dict(zip(inner.jaxpr.invars, ins, strict=True)), runs, False)
        grad = any(self.values[i].grad for i in ins)
        out = self.value(equation.eqn.outvars[0], equation.outs[0], grad, runs)
        self.values[out].parameter = self.values[ins[0]].parameter
        return [out]

    def _attention(self, equation: Equation, ins: list[int], runs: int) -> list[int]:
        """Read what one kernel does, of which nothing is in memory but what it reads and writes."""
        inner = equation.scopes[0]
        self._call = len(self.calls)
        (out,) = self.scope(inner, dict(zip(inner.jaxpr.invars, ins, strict=True)), runs, False)
        self._call = -1
        self.values[out].call = -1
        self.calls.append(FusedCall(tuple(ins), (out,), equation.index, runs))
        return [out]

    def _scan(self, equation: Equation, ins: list[int], runs: int, rematted: bool) -> list[int]:
        scan, inner = scan_parts(equation.eqn), equation.scopes[0]
        length = int(equation.eqn.params["length"])
        outside = self._section, self._stack_of_layers
        is_main, is_stack = equation.index == self._main, equation.index in self._stacks
        if is_stack:
            # Each is under the plan's remat.
            self._section, self._stack_of_layers = LAYERS, self._stacks.index(equation.index)
        if is_main:
            self.layers = length
            self.layer_dim = (
                equation.factors[0].dims[0] if equation.factors and equation.factors[0].dims else -1
            )
        first_xs = scan.num_consts + scan.num_carry
        env: dict[Any, int] = {}
        for n, var in enumerate(inner.jaxpr.invars):
            if n < scan.num_consts:
                env[var] = ins[n]
                continue
            old = self.values[ins[n]]
            env[var] = self.value(var, inner.dims_of(var), old.grad, runs * length)
            self.values[env[var]].source = ins[n]
            if n >= first_xs:
                self.values[env[var]].parameter = old.parameter
            else:
                # A carry that starts as a constant may still depend on parameters after a turn.
                self.values[env[var]].grad |= _floats(var) and any(self.values[i].grad for i in ins)
                if is_main:
                    self.carries.append(env[var])
                if is_stack:
                    self.streams.append(env[var])
        if is_stack:
            constants = [i for i in ins[: scan.num_consts] if self._travels(i)]
            carried = [env[var] for var in inner.jaxpr.invars[scan.num_consts : first_xs]]
            self.counts[self._stack_of_layers] = length
            self.through[self._stack_of_layers] = (*constants, *carried)
        outs = self.scope(inner, env, runs * length, rematted)
        if not is_main:
            # What others read of them is kept as what stands outside.
            self._section, self._stack_of_layers = outside
        results = []
        for n, var in enumerate(equation.eqn.outvars):
            result = self.value(var, equation.outs[n], self.values[outs[n]].grad, runs)
            self.values[result].source = outs[n]
            results.append(result)
        if is_main:
            self._section, self._stack_of_layers = AFTER, outside[1]
        return results

    def _travels(self, index: int) -> bool:
        """Whether a constant of layers comes from the batch, and its gradient goes back."""
        value = self.values[index]
        return value.grad and value.parameter < 0 and not {*value.dims}.isdisjoint(self.program.data_dims)

    def _while(self, equation: Equation, ins: list[int], runs: int, rematted: bool) -> list[int]:
        parts, body = while_parts(equation.eqn), equation.scopes[1]
        given = ins[parts.num_cond_consts :]
        times = runs * (equation.trips or 1)
        env = {
            var: self.value(var, body.dims_of(var), self.values[i].grad, times)
            for var, i in zip(body.jaxpr.invars, given, strict=True)
        }
        return self.scope(body, env, times, rematted)

    def _op(self, equation: Equation, ins: list[int], runs: int, rematted: bool) -> list[int]:
        beside = equation.index in self._aside
        stops = beside or equation.primitive == "stop_gradient"
        grad = not stops and any(self.values[i].grad for i in ins)
        outs = [
            self.value(var, equation.outs[n], grad and _floats(var), runs)
            for n, var in enumerate(equation.eqn.outvars)
        ]
        if len(ins) == 1:
            sources = {self.values[i].parameter for i in ins if self.values[i].elements > 1}
            if len(sources) == 1:
                for out in outs:
                    self.values[out].parameter = next(iter(sources))
        elif all(self.values[i].parameter >= 0 or self.values[i].elements <= 1 for i in ins):
            largest = max(ins, key=lambda i: self.values[i].elements, default=-1)
            for out in outs:
                self.values[out].parameter = self.values[largest].parameter if largest >= 0 else -1
        if beside and all(self.values[i].parameter >= 0 or self.values[i].elements <= 1 for i in ins):
            # Worked out where it is stored, beside the optimizer's step (`Pricer.time`).
            return outs
        for out in outs:
            self.values[out].producer = len(self.ops)
        self.ops.append(
            FlatOp(
                equation=equation,
                ins=ins,
                outs=outs,
                section=self._section,
                runs=runs,
                rematted=rematted,
                call=self._call,
                stack=self._stack_of_layers,
                grouped=self._slots is not None,
            )
        )
        return outs


def _heaviest_first(equation: Equation) -> list[Scope]:
    return sorted(equation.scopes, key=lambda scope: -len(list(scope.equations)))


def _main_scan(program: Program) -> int:
    """Return the index of the scan over layers that does most work, or -1; stages cut stacked parameters."""
    best, most = -1, (False, 0.0)
    for equation in program.equations():
        if equation.primitive != "scan" or not _is_over_layers(program, equation):
            continue
        inside = [one for scope in equation.scopes for one in walk_equations(scope)]
        amount = sum(work(one).flops * one.multiplicity for one in inside)
        stacked = any(program.dims[dim].stacked for dim in _walked(equation))
        if amount > 0 and (stacked, amount) > most:
            best, most = equation.index, (stacked, amount)
    return best


def _scans_over_layers(program: Program, main: int) -> list[int]:
    """Return the indices of the scans over layers as they run, the `main` one among them."""
    found = [
        one.index for one in layer_scans(program.scope) if one.index == main or _is_over_layers(program, one)
    ]
    return found if main in found else [main, *found]


def _is_over_layers(program: Program, scan: Equation) -> bool:
    """Whether a scan is over stacked parameters, or runs one layer again, over nothing of the data."""
    walked = [program.dims[dim] for dim in _walked(scan)]
    if any(dim.stacked for dim in walked):
        return True
    parts = scan_parts(scan.eqn)
    of_data = any(program.arguments[place.argument].is_data for dim in walked for place in dim.places)
    return parts.num_carry > 0 and (parts.num_xs == 0 or not of_data)


def _walked(scan: Equation) -> tuple[int, ...]:
    return scan.factors[0].dims if scan.factors else ()


def _floats(var: Any) -> bool:
    return np.issubdtype(np.dtype(_kind(getattr(var.aval, "dtype", np.int32))), np.floating)


def _kind(dtype: Any) -> str:
    """Return a NumPy kind that stands for `dtype`: NumPy has no bfloat16 and no float8."""
    name = str(dtype)
    return "float32" if "float" in name else "int32"


def _item_bytes(dtype: Any) -> int:
    return int(getattr(dtype, "itemsize", 4))


def flatten(program: Program, *, kernels: frozenset[int] = frozenset()) -> Flat:
    """Return the ops of `program` over numbered values.

    Of `kernels`, indices of calls of `ops.attention`, each is carried out by a kernel, so that its scores are
    nowhere else.
    """
    reader = _Flattener(program, kernels)
    reader.read()
    return Flat(
        values=reader.values,
        ops=reader.ops,
        carries=tuple(reader.carries),
        streams=tuple(reader.streams),
        layers=reader.layers,
        inputs=tuple(reader.inputs),
        layer_dim=reader.layer_dim,
        main=reader.main,
        stacks=reader.stacks,
        counts=tuple(reader.counts),
        through=tuple(reader.through),
        calls=tuple(reader.calls),
        own=tuple(reader.own),
    )
