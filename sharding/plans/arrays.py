"""The arrays of a program under a decision: their shardings, and whether they are those it was made for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..errors import UserError, check_word, nearest, wrong
from ..hardware.mesh import check_mesh, make_mesh
from ..hardware.topology import Topology
from ..paths import by_path, called, map_by_path
from ..program.around import mesh_of_caller
from ..program.explicit import without_layouts
from ..program.jaxpr import Traced, Traces
from ..program.leaves import check_leaves
from ..program.loss import abstract, checked
from ..program.program import Program, Result
from ..program.recognise import recognised
from .owners import ALL, Owners, spec_by_owner, spread
from .record import ArrayPlan, Decision, Record
from .specs import Spec, axes_in, axes_of, cut_into
from .trainable import is_trained

# Types of keys, of which NumPy knows nothing.
_KEY_BYTES = {"key<fry>": 8, "key<rbg>": 16, "key<urbg>": 16}
# What an array of each kind is one of.
_CALLED = {"parameter": "parameters", "batch array": "batch", "state array": "loss's state"}
# What of a plan is asked about.
_KINDS = ("params", "batch", "state")
# The share of a device's memory from which on an array matters.
_MATTERS = 0.01


def mesh_of(plan: Decision, devices: Any = None) -> Mesh:
    """Return the plan's mesh over the topology's devices, or over `devices`."""
    return make_mesh(plan.mesh, plan.topology, devices=devices)


def specs(plan: Decision, tree: Any, kind: str = "params") -> Any:
    """Return the PartitionSpec of every array in a tree, see `Plan.specs`."""
    check_word("kind", kind, _KINDS)
    check_leaves(tree, "array")
    if kind != "params":
        one = {"batch": "batch array", "state": "state array"}[kind]
        rows = getattr(plan, kind) or {}
        if not by_path(tree).keys() & rows.keys() and (said := _other_than(plan, one, tree)) is not None:
            raise UserError(said)
        return map_by_path(lambda path, leaf: PartitionSpec(*_planned(rows, path, leaf)), tree)
    lying = lying_under(plan)
    if (paths := by_path(tree).keys()) and paths == plan.batch.keys() and not paths & plan.params.keys():
        raise UserError('these are the arrays of the batch: give specs or shardings the kind "batch" too')
    if _is_state(plan, tree):
        # A parameter may be named as a part of the state is, ``step`` say.
        kinds = {"params": "params"} if plan.state is None else {"params": "params", "state": "state"}
        return {
            name: specs(plan, part, kinds[name]) if name in kinds else map_by_path(lying.spec, part)
            for name, part in tree.items()
        }

    def spec(path: str, leaf: Any) -> PartitionSpec:
        # Below ``params`` of a state that lacks some of them.
        for own in (path, path.removeprefix("params/")):
            if own in plan.params:
                return PartitionSpec(*_planned(plan.params, own, leaf))
        # The loss's own state stands below ``state``, and may be like the parameters.
        if plan.state is not None and path.startswith("state/"):
            return PartitionSpec(*_planned(plan.state, path.removeprefix("state/"), leaf))
        return lying.spec(path, leaf)

    return map_by_path(spec, tree)


def shardings(plan: Decision, tree: Any, mesh: Mesh | AbstractMesh, kind: str = "params") -> Any:
    """Return the NamedSharding of every array in `tree`, as `specs` does."""
    check_mesh(mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(plan, tree, kind))


def specs_of_moments(plan: Decision, params: Any) -> Any:
    """Return the PartitionSpec of every parameter's gradient and moments, in a tree of parameters."""
    return map_by_path(
        lambda path, leaf: PartitionSpec(*plan.moments.get(path, _planned(plan.params, path, leaf))), params
    )


def axes_of_dims(plan: Decision, program: Program) -> dict[int, tuple[str, ...]]:
    """Return the mesh axes of the dims of a traced `program`, by their numbers."""
    if not isinstance(program, Program):
        raise wrong("program", program, "is no program; give what meshwright.sharding.program.trace returns")
    numbers = numbers_of_dims(plan, program)
    return {numbers[name]: row.axes for name, row in plan.dims.items() if row.axes and name in numbers}


def numbers_of_dims(plan: Decision, program: Program) -> dict[str, int]:
    """Return the number in a traced `program` of each of the plan's dims, by its name there."""
    at = {(a.position, a.path): a.dims for a in program.arguments}
    parts: dict[tuple[int, str, int], int] = {}
    for row in plan.dims.values():
        place = (row.argument, row.path, row.dimension)
        parts[place] = max(parts.get(place, 0), row.part + 1)
    found = {}
    for name, row in plan.dims.items():
        dims = at[row.argument, row.path][row.dimension]
        # Where a dimension is several in one, a part of the rows may have fewer of them: XLA is told nothing.
        if len(dims) >= parts[row.argument, row.path, row.dimension]:
            found[name] = dims[row.part]
    return found


def unsaid_dims(plan: Decision, program: Program, axes: Mapping[int, tuple[str, ...]]) -> frozenset[int]:
    """Return the dims of rows that the plan cuts though it says nothing of the dims: a loss regroups them."""
    cut = {path for path, row in plan.batch.items() if row.spec[:1] not in ((), (None,))}
    rows = [a for a in program.arguments if a.position == 1 and a.dims and a.path in cut]
    return frozenset(dim for a in rows if a.dims[0] and a.dims[0][0] not in axes for dim in a.dims[0])


def bytes_per_device(plan: Decision, kind: str = "params") -> int:
    """Return the bytes of the parameters (or ``batch``, or ``state``) that one device holds."""
    check_word("kind", kind, _KINDS)
    return sum(
        math.prod(row.shape) * item_bytes(row.dtype) // cut_into(axes_in(row.spec), plan.mesh)
        for row in (getattr(plan, kind) or {}).values()
    )


def whole_bytes(rows: Mapping[str, ArrayPlan]) -> int:
    """Return the bytes of arrays, of all devices together."""
    return sum(math.prod(row.shape) * item_bytes(row.dtype) for row in rows.values())


def item_bytes(dtype: str) -> int:
    """Return the bytes of one element of a type by its name, a JAX key's too.

    >>> item_bytes("bfloat16"), item_bytes("key<fry>")
    (2, 8)
    """
    return _KEY_BYTES[dtype] if dtype in _KEY_BYTES else jnp.dtype(dtype).itemsize


def check(
    plan: Record, params: Any, batch: Any, loss: Callable[..., Any] | None = None, state: Any = None
) -> None:
    """Raise UserError, naming what differs, if the plan was made for other arrays or another `loss`.

    `state` are the arrays that change beside the parameters, None for a loss without them.
    """
    check_arrays(plan, "parameter", params)
    check_arrays(plan, "batch array", batch)
    check_has_state(plan, state)
    if state is not None:
        check_arrays(plan, "state array", state)
    if loss is not None and plan.origin is not None:
        mesh = mesh_of_caller()

        def rewrite(traced: Traced) -> Traced:
            return recognised(without_layouts(traced, mesh), plan.recognise)

        args = (
            abstract(params, "parameter"),
            abstract(batch, "batch array"),
            *(() if state is None else (abstract(state, "state array"),)),
        )
        plan.origin.check(Traces(checked(loss), rewrite, mesh).on(*args))


def check_has_state(plan: Decision, state: Any) -> None:
    """Raise UserError if a loss with a state, or without, meets a plan for one of the other kind."""
    if plan.state is None and state is not None:
        raise UserError("the plan was made for a loss without a state; plan with state=its shapes")
    if plan.state is not None and state is None:
        raise UserError(
            f"the plan was made for loss(params, batch, state) with a state of {len(plan.state)} arrays; "
            "give the state too"
        )


def check_new_state(old: Mapping[str, Any], results: Iterable[Result]) -> None:
    """Raise UserError if a loss with a state gives no new one, or one that is not like the `old` by path."""
    new = {row.path: row for row in results}
    if any(path != "0" and not path.startswith(("1/0", "1/1")) for path in new) or "0" not in new:
        found = "a scalar alone" if list(new) == [""] else f"arrays at {', '.join(map(repr, list(new)[:4]))}"
        raise UserError(
            "a loss with a state returns (loss, (aux, state)), with {} for no aux; "
            f"this one returns {found}"
        )
    rows = {path.removeprefix("1/1").removeprefix("/"): row for path, row in new.items() if path[:3] == "1/1"}
    for path in old:
        if path not in rows:
            raise UserError(f"the new state lacks {path!r}, which the state has; {nearest(path, rows)}")
    for path, row in rows.items():
        if path not in old:
            raise UserError(f"the new state has {path!r}, which the state lacks; {nearest(path, old)}")
        wanted = old[path]
        if (row.shape, row.dtype) != (tuple(wanted.shape), wanted.dtype):
            has = f"has {path!r} as" if path else "is"
            raise UserError(
                f"the new state {has} {row.dtype}{list(row.shape)}, the state "
                f"{'as ' if path else ''}{wanted.dtype}{list(wanted.shape)}; return it as it came"
            )


def check_arrays(plan: Decision, kind: str, tree: Any) -> None:
    """Raise UserError if `tree` is not what the plan has of a `kind`.

    A ``parameter``, a ``batch array`` or a ``state array``.
    """
    planned = _table(plan, kind)
    for path, (shape, dtype) in _same_paths(plan, kind, tree).items():
        if planned[path].shape != shape:
            raise UserError(
                f"{called(kind, path)} has shape {shape}; the plan was made for {planned[path].shape}"
            )
        _check_type(kind, path, planned[path], dtype)


def check_rows(plan: Decision, batch: Any) -> None:
    """Raise UserError if `batch` differs from what the plan was made for in more than its number of rows.

    So does one whose rows do not divide by the axes that cut them.
    """
    have = _same_paths(plan, "batch array", batch)
    cut = [row.shape[0] for row in plan.batch.values() if row.spec and row.spec[0]]
    leads = cut or [row.shape[0] for row in plan.batch.values() if row.shape]
    # Of as many arrays each, those of the most numbers: a key's own length is none of rows.
    size = {row.shape[0]: math.prod(row.shape) for row in plan.batch.values() if row.shape}
    planned_rows = max(leads, key=lambda lead: (leads.count(lead), size[lead]), default=0)
    first: tuple[str, int] | None = None
    for path, row in plan.batch.items():
        shape, dtype = have[path]
        _check_type("batch array", path, row, dtype)
        led = row.shape[:1] == (planned_rows,)
        if shape != row.shape and not (led and shape and shape[1:] == row.shape[1:]):
            raise UserError(
                f"{called('batch array', path)} has shape {shape}; the plan was made for {row.shape}"
            )
        if not (led and row.spec and row.spec[0]):
            continue
        first = first or (path, shape[0])
        if shape[0] != first[1]:
            raise UserError(f"batch array {path!r} has {shape[0]} rows and {first[0]!r} has {first[1]}")
        parts = axes_of(row.spec[0])
        needed = cut_into(parts, plan.mesh)
        if left := shape[0] % needed:
            written = " x ".join(f"{axis}={plan.mesh[axis]}" for axis in parts)
            near = " or ".join(str(n) for n in (shape[0] - left, shape[0] - left + needed) if n)
            raise UserError(f"a batch of {shape[0]} rows does not divide by {written}; nearest: {near} rows")


def _check_type(kind: str, path: str, row: ArrayPlan, dtype: str) -> None:
    if dtype != (wanted := _canonical(row.dtype)):
        raise UserError(f"{called(kind, path)} is of type {dtype}; the plan was made for {wanted}")


def _canonical(dtype: str) -> str:
    """Return the type that JAX has for a type by its name: int32 for int64, unless told otherwise."""
    return dtype if dtype in _KEY_BYTES else str(jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)))


def resized(plan: Decision, params: Any, batch: Any, state: Any = None, **others: Any) -> Decision:
    """Return the same decision for arrays of other sizes, such as a model of fewer layers.

    `others` are fields that change with them, such as the mesh. Raises UserError if a path is missing or new,
    or if an axis does not divide a new size.
    """
    check_has_state(plan, state)
    rows = {"params": _reshaped(plan, "parameter", params), "batch": _reshaped(plan, "batch array", batch)}
    if state is not None:
        rows["state"] = _reshaped(plan, "state array", state)
    dims = {}
    for name, dim in plan.dims.items():
        table = ("params", "batch", "state")[dim.argument]
        whole = getattr(plan, table)[dim.path].shape[dim.dimension]
        size = rows[table][dim.path].shape[dim.dimension]
        if not size:
            raise UserError(f"{dim.path!r} has no {name}: its shape is {rows[table][dim.path].shape}")
        if whole * dim.size % size and size * dim.size % whole:
            raise UserError(f"{name}={dim.size} of {dim.path!r} does not keep its share of {whole} in {size}")
        # A part of a dimension that is several in one grows and shrinks with the whole.
        dims[name] = dataclasses.replace(dim, size=max(dim.size * size // whole, 1))
    return dataclasses.replace(plan.decision(), **rows, dims=dims, **others)


def _reshaped(plan: Decision, kind: str, tree: Any) -> dict[str, ArrayPlan]:
    planned = _table(plan, kind)
    have = _same_paths(plan, kind, tree)
    for path, row in planned.items():
        if len(have[path][0]) != len(row.shape):
            raise UserError(f"{called(kind, path)} has shape {have[path][0]}, not one like {row.shape}")
    return {path: dataclasses.replace(row, shape=have[path][0]) for path, row in planned.items()}


def _table(plan: Decision, kind: str) -> Mapping[str, ArrayPlan]:
    tables = {"parameter": plan.params, "batch array": plan.batch, "state array": plan.state or {}}
    check_word("kind", kind, tables)
    return tables[kind]


def _same_paths(plan: Decision, kind: str, tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return path → shape and type of `tree`. Raises UserError if it has other paths than the plan."""
    check_leaves(tree, kind)
    planned = _table(plan, kind)
    have = {
        path: (tuple(jnp.shape(leaf)), str(jnp.result_type(leaf))) for path, leaf in by_path(tree).items()
    }
    if have.keys() != planned.keys() and (said := _other_than(plan, kind, tree)) is not None:
        raise UserError(said)
    for path in planned:
        if path not in have:
            raise UserError(f"the plan has a {kind} {path!r} that the program lacks; {nearest(path, have)}")
    for path in have:
        if path not in planned:
            raise UserError(
                f"the program has a {kind} {path!r} that the plan lacks; {nearest(path, planned)}"
            )
    return have


def _other_than(plan: Decision, kind: str, tree: Any) -> str | None:
    """Say which other part of a step `tree` is, given where a `kind` is wanted; None if it is none."""
    paths = by_path(tree).keys()
    wanted = _CALLED[kind]
    if kind == "parameter" and _is_state(plan, tree):
        return 'what was given as the parameters is a training state: give its ["params"]'
    if _is_state(plan, tree):
        return f"what was given as the {wanted} is a training state; are two arguments swapped?"
    for other in _CALLED:
        if other != kind and paths and paths == _table(plan, other).keys():
            return f"what was given as the {wanted} is the plan's {_CALLED[other]}: the two look swapped"
    return None


def _planned(rows: Mapping[str, ArrayPlan], path: str, leaf: Any) -> Spec:
    if path not in rows:
        raise UserError(f"the plan has no {path!r}; {nearest(path, rows)}")
    if rows[path].shape != tuple(jnp.shape(leaf)):
        raise UserError(f"{path!r} has shape {jnp.shape(leaf)}; the plan was made for {rows[path].shape}")
    return rows[path].spec


def _is_state(plan: Decision, tree: Any) -> bool:
    """Whether `tree` is a training state: the plan's parameters stand below its ``params``."""
    if not isinstance(tree, dict) or "params" not in tree:
        return False
    return {*by_path(tree["params"])} == {*plan.params} != {*by_path(tree)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lying:
    """How arrays that belong to parameters lie, as their owner's moments do, and those of none.

    `specs` has the spec of each trained parameter's moments on `mesh`; arrays of more than `least` bytes
    matter.
    """

    owners: Owners
    specs: Mapping[str, Spec]
    mesh: Mapping[str, int]
    least: float

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that cut some parameter's moments, in the mesh's order."""
        used = {axis for spec in self.specs.values() for axis in axes_in(spec)}
        return tuple(axis for axis in self.mesh if axis in used)

    def spec(self, path: str, leaf: Any) -> PartitionSpec:
        """Return the spec of an array at `path` of an optimizer's state, say.

        One that belongs to no parameter is cut over the axes of the parameters if it matters on a device.
        """
        shape = tuple(jnp.shape(leaf))
        owned = self.owners.of(path, shape)
        if owned.owner is not None:
            spec = (self.axes,) if owned.owner == ALL else self.specs[owned.owner]
            return PartitionSpec(*spec_by_owner(owned, shape, spec, self.mesh))
        if math.prod(shape) * item_bytes(str(jnp.result_type(leaf))) > self.least:
            return PartitionSpec(*spread(shape, self.axes, self.mesh))
        return PartitionSpec()


def lying_under(plan: Decision) -> Lying:
    """Return how arrays that belong to the parameters of `plan` lie under it."""
    rows = {path: row for path, row in plan.params.items() if is_trained(plan, path, row)}
    return Lying(
        owners=Owners({path: row.shape for path, row in rows.items()}),
        specs={path: plan.moments.get(path, row.spec) for path, row in rows.items()},
        mesh=plan.mesh,
        least=least_that_matters(plan.topology, whole_bytes(plan.params)),
    )


def least_that_matters(topology: Topology, parameter_bytes: float) -> float:
    """Return the bytes from which an array that is whole on every device is worth cutting, or a word.

    A hundredth of a device's memory; of simulated ones, whose memory is that of no chip, of the parameters.
    """
    whole = parameter_bytes if topology.chip.nominal else topology.chip.usable_bytes
    return _MATTERS * whole
