"""A program as tables of numbers, read once, from which any candidate is priced by a few array operations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..ops.arithmetic import is_short, widens
from ..program.aside import aside
from ..program.flops import matmul_roles, work
from ..program.layers import saved_values
from ..program.lookups import looks_up_rows
from ..program.program import Program
from .fusion import Groups, fuse
from .kept import Saved, made_of_parameters, residuals
from .tables import AFTER, BEFORE, LAYERS, Flat, FlatOp, Value, flatten

# Captured arrays of fewer bytes, such as a table of angles, are counted with nothing.
_LEAST_CAPTURED = 2**16
# Kinds of factor that a device can have a part of.
_DIVISIBLE = ("map", "contract", "reduce", "index", "group", "resize")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """The arrays, V of them: bytes of one run, dims [V, D], whether gradients flow, parameter index or -1.

    item_bytes: of an element; stack: the scan over layers that each is inside of, as they run, or -1; slots:
    whether its rows are those of experts, as many as an even router gives each.
    """

    bytes: np.ndarray
    item_bytes: np.ndarray
    dims: np.ndarray
    grad: np.ndarray
    parameter: np.ndarray
    core: np.ndarray
    section: np.ndarray
    runs: np.ndarray
    width: np.ndarray
    stack: np.ndarray
    slots: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """The equations, E of them: the dims that can divide them [E, D], section, runs, recomputed anyway."""

    space: np.ndarray
    section: np.ndarray
    runs: np.ndarray
    rematted: np.ndarray
    core: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Uses:
    """Where an equation reads or writes a value: equation [U], value [U], dims to divide it by [U, D]."""

    equation: np.ndarray
    value: np.ndarray
    dims: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """Matrix products, M: equation, flops, gradients each has (0 to 2), values [M, 3] (operands, result).

    role_sizes [M, 4] and role_dims [M, 4, D] are of batch, left, right and contracted; grouped [M] says that
    the batch are experts, to which left are the rows that an even router gives each, widens [M] that operands
    are of bfloat16 and the result is not; call [M] is the index of the fused call of attention, or -1, and
    call_runs [M] how often that runs.
    """

    equation: np.ndarray
    flops: np.ndarray
    gradients: np.ndarray
    values: np.ndarray
    role_sizes: np.ndarray
    role_dims: np.ndarray
    grouped: np.ndarray
    widens: np.ndarray
    call: np.ndarray
    call_runs: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShortSums:
    """A look-up's gradient in a `table` of 16 bits: so many `elements` of a `value`, and where it stands."""

    elements: float
    table: int
    value: int
    section: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Parameters:
    """What is stored, parameters and state, P rows of argument index, elements, bytes of one, dims [P, D].

    section, runs: of their use; stack: the scan over layers that it is in, as of `Values`.

    used_bytes: of one as it is used: a cast comes before the gather. after_bytes: likewise after the layers,
    0 where it is not used there: a table of embeddings may be, too. trained: 1 where it has a gradient and
    moments, else 0; state: 1 of what changes beside the parameters; read: 1 where the loss reads it.
    lookups: of tables that are read by rows alone, row → the look-ups. Parameters that the program stacks are
    one; stacked_bytes are of one element of the stack, 0 of others. made_bytes: of its cast, where layers
    make one that their gradients read: JAX keeps it where it keeps everything; 0 where they read it itself.
    """

    argument: np.ndarray
    trained: np.ndarray
    state: np.ndarray
    read: np.ndarray
    stacked_bytes: np.ndarray
    made_bytes: np.ndarray
    elements: np.ndarray
    item_bytes: np.ndarray
    used_bytes: np.ndarray
    after_bytes: np.ndarray
    dims: np.ndarray
    section: np.ndarray
    runs: np.ndarray
    stack: np.ndarray
    lookups: Mapping[int, tuple[TableLookup, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TableLookup:
    """A look-up in a table of so many `rows` by `count` ids; `ids` and `out` are values, what they name."""

    rows: int
    count: float
    ids: int
    out: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ProgramTables:
    """The tables of one program; sizes are unsharded.

    priority [D] orders dims that want the same mesh axis: those of parameters come first; attended are the
    values that kernels of attention give, `attending` the keys and values that each reads, by its call, and
    `kernels` the calls that are fused. `ahead` are values that loops after the layers make of nothing that
    changes, so that JAX makes them ahead of the loop, `taken_apart` those that they take a part of in each
    turn, where it has a gradient. `main`, `counts` and `through`
    are as of `Flat`; `along` holds what `placement` has found out of mesh axes by themselves.
    """

    dim_sizes: np.ndarray
    priority: np.ndarray
    batch_dims: tuple[int, ...]
    values: Values
    steps: Steps
    reads: Uses
    writes: Uses
    products: Products
    short_sums: tuple[ShortSums, ...]
    attended: tuple[int, ...]
    kernels: frozenset[int]
    groups: Groups
    parameters: Parameters
    parameter_dims: tuple[tuple[int, ...], ...]
    saved: Saved
    carries: tuple[int, ...]
    inputs: tuple[int, ...]
    captured_bytes: float
    layers: int
    stacks: int
    main: int = 0
    counts: tuple[int, ...] = (1,)
    through: tuple[tuple[int, ...], ...] = ((),)
    ahead: tuple[int, ...] = ()
    taken_apart: tuple[int, ...] = ()
    attending: Mapping[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    along: dict[object, Any] = dataclasses.field(default_factory=dict, init=False)


def profile(program: Program, *, kernels: frozenset[int] = frozenset()) -> ProgramTables:
    """Read `program` into tables; `kernels` are as in `flatten`."""
    flat = flatten(program, kernels=kernels)
    count = len(program.dims)
    in_parameters = {d for a in program.parameters for composition in a.dims for d in composition}
    priority = np.array([d + (0 if d in in_parameters else count) for d in range(count)], int)
    owners = [_owners(op) for op in flat.ops]
    return ProgramTables(
        dim_sizes=np.array([dim.size for dim in program.dims], float),
        priority=priority,
        batch_dims=tuple(program.data_dims),
        values=_values(flat, count),
        steps=_steps(flat, owners, count),
        reads=_uses(flat, owners, count, "ins"),
        writes=_uses(flat, owners, count, "outs"),
        products=_products(flat, owners, count),
        short_sums=tuple(_short_sums(flat)),
        attended=tuple(call.outs[0] for call in flat.calls),
        attending={call.equation: (call.ins[1], call.ins[2]) for call in flat.calls},
        kernels=kernels,
        groups=fuse(flat),
        parameters=_parameters(program, flat, count),
        parameter_dims=tuple(
            tuple(d for composition in members[0].dims for d in composition) for members in program.weights
        ),
        saved=residuals(
            flat, {name: (value.equation, value.operand) for name, value in saved_values(program).items()}
        ),
        carries=flat.carries,
        inputs=flat.inputs,
        captured_bytes=float(sum(one.bytes for one in program.captured if one.bytes >= _LEAST_CAPTURED)),
        layers=flat.layers,
        stacks=flat.stacks,
        main=flat.main,
        counts=flat.counts,
        through=flat.through,
        ahead=_ahead(flat),
        taken_apart=tuple(n for n, value in enumerate(flat.values) if _is_part(flat, value)),
    )


def _is_part(flat: Flat, value: Value) -> bool:
    """Whether a value is what a loop after the layers takes of an array in each turn, and has a gradient."""
    if value.section != AFTER or value.source < 0 or value.parameter >= 0 or not value.grad:
        return False
    whole = flat.values[value.source]
    return value.trips > whole.trips and value.elements * value.trips == whole.elements * whole.trips


def _ahead(flat: Flat) -> tuple[int, ...]:
    """Return the values of `ProgramTables.ahead`: of those made of one another what something else reads."""
    made: set[int] = set()
    read: set[int] = set()
    for op in flat.ops:
        if op.section != AFTER or op.runs < 2:
            continue
        if op.equation.primitive == "iota" or (op.ins and made.issuperset(op.ins)):
            made.update(op.outs)
        else:
            read.update(op.ins)
    return tuple(sorted(made & read))


def _owners(op: FlatOp) -> dict[int, int]:
    """Return for each dim of an equation the factor that is divided by it.

    A dim that stands twice (the queries' and the keys' sequence) can be divided in one place: in the
    result's.
    """
    owners: dict[int, int] = {}
    factors = op.equation.factors
    for number, factor in enumerate(factors):
        if factor.kind not in _DIVISIBLE:
            continue
        for dim in factor.dims:
            known = owners.get(dim)
            if known is None or (not factors[known].outs and factor.outs):
                owners[dim] = number
    return owners


def _mask(dims: object, count: int) -> np.ndarray:
    row = np.zeros(count, bool)
    row[list(dims)] = True  # type: ignore[call-overload]
    return row


def _stack(rows: list[np.ndarray], *shape: int) -> np.ndarray:
    return np.array(rows, bool).reshape(len(rows), *shape)


def _values(flat: Flat, count: int) -> Values:
    values = flat.values
    return Values(
        bytes=np.array([v.bytes for v in values]),
        item_bytes=np.array([v.item_bytes for v in values], float),
        dims=_stack([_mask(v.dims, count) for v in values], count),
        grad=np.array([v.grad for v in values], bool),
        parameter=np.array([v.parameter for v in values], int),
        core=np.array([v.core for v in values], bool),
        section=np.array([v.section for v in values], int),
        runs=np.array([v.trips for v in values], float),
        width=np.array([v.width for v in values], float),
        stack=np.array([v.stack for v in values], int),
        slots=np.array([v.slots for v in values], bool),
    )


def _steps(flat: Flat, owners: list[dict[int, int]], count: int) -> Steps:
    return Steps(
        space=_stack([_mask(owned, count) for owned in owners], count),
        section=np.array([op.section for op in flat.ops], int),
        runs=np.array([op.runs for op in flat.ops], float),
        rematted=np.array([op.rematted for op in flat.ops], bool),
        core=np.array([any(flat.values[i].core for i in (*op.ins, *op.outs)) for op in flat.ops], bool),
    )


def _uses(flat: Flat, owners: list[dict[int, int]], count: int, side: str) -> Uses:
    equation, value, dims = [], [], []
    for number, op in enumerate(flat.ops):
        for place, index in enumerate(getattr(op, side)):
            if flat.values[index].elements <= 1:
                continue
            here = {
                dim
                for dim, factor in owners[number].items()
                if any(operand == place for operand, _ in getattr(op.equation.factors[factor], side))
            }
            equation.append(number)
            value.append(index)
            dims.append(_mask(here, count))
    return Uses(equation=np.array(equation, int), value=np.array(value, int), dims=_stack(dims, count))


def _products(flat: Flat, owners: list[dict[int, int]], count: int) -> Products:
    equation, flops, gradients, values = [], [], [], []
    sizes, dims, grouped, wider, calls = [], [], [], [], []
    for number, op in enumerate(flat.ops):
        roles = matmul_roles(op.equation)
        if roles is None or not op.runs:
            continue
        places = {id(factor): n for n, factor in enumerate(op.equation.factors)}
        row_sizes, row_dims = [], []
        left, right = roles.lhs, roles.rhs
        of_groups = op.grouped and bool(roles.batch)
        if of_groups and not flat.values[op.ins[0]].slots:
            left, right = right, left
        for factors in (roles.batch, left, right, roles.contracting):
            row_sizes.append(math.prod(f.size for f in factors))
            mine = {d for f in factors for d in f.dims if owners[number].get(d) == places[id(f)]}
            row_dims.append(_mask(mine, count))
        equation.append(number)
        flops.append(work(op.equation).flops)
        gradients.append(sum(flat.values[i].grad for i in op.ins[:2]))
        values.append([op.ins[0], op.ins[1], op.outs[0]])
        wider.append(op.call < 0 and widens(op.equation.eqn))
        calls.append(flat.calls[op.call][2:] if op.call >= 0 else (-1, 0))
        sizes.append(row_sizes)
        grouped.append(of_groups)
        dims.append(row_dims)
    return Products(
        equation=np.array(equation, int),
        flops=np.array(flops, float),
        gradients=np.array(gradients, float),
        values=np.array(values, int).reshape(-1, 3),
        role_sizes=np.array(sizes, float).reshape(-1, 4),
        role_dims=np.array(dims, bool).reshape(-1, 4, count),
        grouped=np.array(grouped, bool),
        widens=np.array(wider, bool),
        call=np.array([index for index, _ in calls], int),
        call_runs=np.array([runs for _, runs in calls], float),
    )


def _short_sums(flat: Flat) -> Iterator[ShortSums]:
    for op in flat.ops:
        if not looks_up_rows(op.equation.eqn) or not flat.values[op.ins[0]].grad:
            continue
        aval: Any = op.equation.eqn.invars[0].aval
        if is_short(aval.dtype):
            out = op.outs[0]
            elements = flat.values[out].elements * op.runs
            yield ShortSums(elements=elements, table=op.ins[0], value=out, section=op.section)


def _parameters(program: Program, flat: Flat, count: int) -> Parameters:
    used: dict[int, tuple[int, int, int, int]] = {}
    after: dict[int, int] = {}
    for op in flat.ops:
        if op.equation.primitive == "convert_element_type":
            continue
        for index in op.ins:
            parameter = flat.values[index].parameter
            if parameter >= 0 and op.section == AFTER:
                after.setdefault(parameter, flat.values[index].item_bytes)
            if parameter >= 0 and parameter not in used:
                used[parameter] = (op.section, op.runs, op.stack, flat.values[index].item_bytes)
    rows, unread, found = [], aside(program).inputs, _lookups(flat)
    for members in program.weights:
        argument, stack = members[0], program.stack_of.get(members[0].index)
        dims = {d for composition in argument.dims for d in composition}
        if stack is not None:
            dims.add(stack.dim)
        section, runs, inside, size = used.get(argument.index, (BEFORE, 1, -1, argument.dtype.itemsize))
        if flat.layer_dim in dims:
            section, runs, inside = LAYERS, flat.layers, flat.main
        elif section == LAYERS and not any(program.dims[dim].stacked for dim in dims):
            # The same in every turn: gathered, and its gradient reduced, once.
            runs = 1
        rows.append((argument, _mask(dims, count), size, section, runs, inside))
    shares = [sum(a.is_trained for a in members) / len(members) for members in program.weights]
    sizes = [sum(math.prod(a.shape) for a in members) for members in program.weights]
    made = made_of_parameters(flat)
    stacks = [program.stack_of.get(members[0].index) for members in program.weights]
    return Parameters(
        argument=np.array([a.index for a, *_ in rows], int),
        trained=np.array(shares, float),
        state=np.array([a.is_state for a, *_ in rows], float),
        read=np.array([not (a.is_state and unread[a.index]) for a, *_ in rows], float),
        stacked_bytes=np.array([0 if stack is None else stack.item_bytes for stack in stacks], float),
        made_bytes=np.array(
            [made.get(a.index, 0.0) / max(size, 1) for (a, *_), size in zip(rows, sizes, strict=True)], float
        ),
        elements=np.array(sizes, float),
        item_bytes=np.array([a.dtype.itemsize for a, *_ in rows], float),
        used_bytes=np.array([size for _, _, size, *_ in rows], float),
        after_bytes=np.array([after.get(a.index, 0) for a, *_ in rows], float),
        dims=_stack([mask for _, mask, *_ in rows], count),
        section=np.array([section for *_, section, _, _ in rows], int),
        runs=np.array([runs for *_, runs, _ in rows], float),
        stack=np.array([inside for *_, inside in rows], int),
        lookups={n: found[a.index] for n, (a, *_) in enumerate(rows) if found.get(a.index)},
    )


def _lookups(flat: Flat) -> dict[int, tuple[TableLookup, ...]]:
    """Return the look-ups in each parameter, by its argument; none of one that is read otherwise too."""
    found: dict[int, list[TableLookup | None]] = {}
    for op in flat.ops:
        if op.equation.primitive == "convert_element_type":
            continue
        for place, index in enumerate(op.ins):
            parameter = flat.values[index].parameter
            if parameter < 0:
                continue
            one = None
            if place == 0 and op.runs == 1 and looks_up_rows(op.equation.eqn):
                aval: Any = op.equation.eqn.invars[0].aval
                ids = flat.values[op.ins[1]]
                one = TableLookup(rows=aval.shape[0], count=ids.elements, ids=op.ins[1], out=op.outs[0])
            found.setdefault(parameter, []).append(one)
    return {
        parameter: tuple(one for one in each if one is not None)
        for parameter, each in found.items()
        if None not in each
    }


__all__ = ["AFTER", "BEFORE", "LAYERS", "ProgramTables", "profile"]
