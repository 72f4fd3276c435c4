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

from ..errors import UserError, nearest
from ..hardware.mesh import make_mesh
from ..paths import by_path, by_suffix, path_of
from ..program.jaxpr import Traces
from ..program.program import Program, Result
from ..program.recognise import recognised
from .record import ArrayPlan, Decision, Record
from .specs import Spec, axes_in, cut_into, derived

# Types of keys, of which NumPy knows nothing.
_KEY_BYTES = {"key<fry>": 8, "key<rbg>": 16, "key<urbg>": 16}


def mesh_of(plan: Decision, devices: Any = None) -> Mesh:
    """Return the plan's mesh over the topology's devices, or over `devices`."""
    return make_mesh(plan.mesh, plan.topology, devices=devices)


def specs(plan: Decision, tree: Any, kind: str = "params") -> Any:
    """Return the PartitionSpec of every array in a tree, see `Plan.specs`."""
    if kind == "params" and _is_state(plan, tree):
        # A parameter may be named as a part of the state is, ``step`` say.
        by_part = {"params": specs, "state": _specs_beside if plan.state is None else _specs_of_state}
        return {name: by_part.get(name, _specs_beside)(plan, part) for name, part in tree.items()}
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: PartitionSpec(*_spec(plan, path_of(keys), tuple(leaf.shape), kind)), tree
    )


def shardings(plan: Decision, tree: Any, mesh: Mesh | AbstractMesh, kind: str = "params") -> Any:
    """Return the NamedSharding of every array in `tree`, as `specs` does."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(plan, tree, kind))


def specs_of_moments(plan: Decision, params: Any) -> Any:
    """Return the PartitionSpec of every parameter's gradient and moments, in a tree of parameters."""

    def spec(keys: Any, leaf: Any) -> PartitionSpec:
        path = path_of(keys)
        return PartitionSpec(*plan.moments.get(path, _spec(plan, path, tuple(leaf.shape), "params")))

    return jax.tree_util.tree_map_with_path(spec, params)


def axes_of_dims(plan: Decision, program: Program) -> dict[int, tuple[str, ...]]:
    """Return the mesh axes of the dims of a traced `program`, by their numbers."""
    at = {(a.position, a.path): a.dims for a in program.arguments}
    return {
        at[row.argument, row.path][row.dimension][row.part]: row.axes
        for row in plan.dims.values()
        if row.axes
    }


def bytes_per_device(plan: Decision, kind: str = "params") -> int:
    """Return the bytes of the parameters (or ``batch``, or ``state``) that one device holds."""
    return sum(
        math.prod(row.shape) * item_bytes(row.dtype) // cut_into(axes_in(row.spec), plan.mesh)
        for row in (getattr(plan, kind) or {}).values()
    )


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
        rewrite = functools.partial(recognised, which=plan.recognise)
        plan.origin.check(Traces(loss, rewrite).on(params, batch, *(() if state is None else (state,))))


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
        raise UserError(
            "a loss with a state returns (loss, (aux, state)), with {} for no aux; "
            f"this one returns arrays at {', '.join(map(repr, list(new)[:4]))}"
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
            raise UserError(
                f"the new state has {path!r} as {row.dtype}{list(row.shape)}, the state as "
                f"{wanted.dtype}{list(wanted.shape)}; return it as it came"
            )


def check_arrays(plan: Decision, kind: str, tree: Any) -> None:
    """Raise UserError if `tree` is not what the plan has of a `kind`.

    A ``parameter``, a ``batch array`` or a ``state array``.
    """
    planned = _table(plan, kind)
    for path, shape in _same_paths(kind, planned, tree).items():
        if planned[path].shape != shape:
            raise UserError(f"{kind} {path!r} has shape {shape}; the plan was made for {planned[path].shape}")


def resized(plan: Decision, params: Any, batch: Any, state: Any = None) -> Decision:
    """Return the same decision for arrays of other sizes, such as a model of fewer layers.

    Raises UserError if a path is missing or new, or if an axis does not divide a new size.
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
        if whole * dim.size % size and size * dim.size % whole:
            raise UserError(f"{name}={dim.size} of {dim.path!r} does not keep its share of {whole} in {size}")
        # A part of a dimension that is several in one grows and shrinks with the whole.
        dims[name] = dataclasses.replace(dim, size=dim.size * size // whole)
    return dataclasses.replace(plan.decision(), **rows, dims=dims)


def _reshaped(plan: Decision, kind: str, tree: Any) -> dict[str, ArrayPlan]:
    planned = _table(plan, kind)
    have = _same_paths(kind, planned, tree)
    for path, row in planned.items():
        if len(have[path]) != len(row.shape):
            raise UserError(f"{kind} {path!r} has shape {have[path]}, not one like {row.shape}")
    return {path: dataclasses.replace(row, shape=have[path]) for path, row in planned.items()}


def _table(plan: Decision, kind: str) -> Mapping[str, ArrayPlan]:
    tables = {"parameter": plan.params, "batch array": plan.batch, "state array": plan.state or {}}
    return tables[kind]


def _same_paths(kind: str, planned: Mapping[str, ArrayPlan], tree: Any) -> dict[str, tuple[int, ...]]:
    """Return path → shape of `tree`. Raises UserError if it has other paths than the plan."""
    have = {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}
    for path in planned:
        if path not in have:
            raise UserError(f"the plan has a {kind} {path!r} that the program lacks; {nearest(path, have)}")
    for path in have:
        if path not in planned:
            raise UserError(
                f"the program has a {kind} {path!r} that the plan lacks; {nearest(path, planned)}"
            )
    return have


def _is_state(plan: Decision, tree: Any) -> bool:
    """Whether `tree` is a training state: the plan's parameters stand below its ``params``."""
    if not isinstance(tree, dict) or "params" not in tree:
        return False
    return {*by_path(tree["params"])} == {*plan.params} != {*by_path(tree)}


def _specs_of_state(plan: Decision, state: Any) -> Any:
    return specs(plan, state, "state")


def _specs_beside(plan: Decision, part: Any) -> Any:
    """Return the PartitionSpecs of a part of a training state other than its parameters."""

    def spec(keys: Any, leaf: Any) -> PartitionSpec:
        owner = by_suffix(path_of(keys), plan.params)
        return PartitionSpec(*(() if owner is None else _spec_of_moment(plan, owner, tuple(leaf.shape))))

    return jax.tree_util.tree_map_with_path(spec, part)


def _spec(plan: Decision, path: str, shape: tuple[int, ...], kind: str) -> Spec:
    planned: ArrayPlan | None = (getattr(plan, kind) or {}).get(path)
    if planned is not None:
        if planned.shape != shape:
            raise UserError(f"{path!r} has shape {shape}; the plan was made for {planned.shape}")
        return planned.spec
    # In a whole training state the loss's own stands below ``state``, and may be like the parameters.
    if kind == "params" and plan.state is not None and path.startswith("state/"):
        return _spec(plan, path.removeprefix("state/"), shape, "state")
    owner = by_suffix(path, plan.params) if kind == "params" else None
    if owner is None:
        return ()
    if path == f"params/{owner}":
        # Of a training state that lacks some parameters.
        return derived(plan.params[owner].spec, plan.params[owner].shape, shape)
    return _spec_of_moment(plan, owner, shape)


def _spec_of_moment(plan: Decision, owner: str, shape: tuple[int, ...]) -> Spec:
    row = plan.params[owner]
    return derived(plan.moments.get(owner, row.spec), row.shape, shape)
