"""The arrays of a program under a decision: their shardings, and whether they are those it was made for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..errors import UserError, nearest
from ..hardware.mesh import make_mesh
from ..paths import by_path, by_suffix, path_of
from ..program.jaxpr import Traces
from ..program.program import Program
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
        return {
            name: specs(plan, part) if name == "params" else _specs_beside(plan, part)
            for name, part in tree.items()
        }
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
    """Return the bytes of the parameters (or ``batch``) that one device holds."""
    return sum(
        math.prod(row.shape) * item_bytes(row.dtype) // cut_into(axes_in(row.spec), plan.mesh)
        for row in getattr(plan, kind).values()
    )


def item_bytes(dtype: str) -> int:
    """Return the bytes of one element of a type by its name, a JAX key's too.

    >>> item_bytes("bfloat16"), item_bytes("key<fry>")
    (2, 8)
    """
    return _KEY_BYTES[dtype] if dtype in _KEY_BYTES else jnp.dtype(dtype).itemsize


def check(plan: Record, params: Any, batch: Any, loss: Callable[..., Any] | None = None) -> None:
    """Raise UserError, naming what differs, if the plan was made for other arrays or another `loss`."""
    check_arrays(plan, "parameter", params)
    check_arrays(plan, "batch array", batch)
    if loss is not None and plan.origin is not None:
        rewrite = functools.partial(recognised, which=plan.recognise)
        plan.origin.check(Traces(loss, rewrite).on(params, batch))


def check_arrays(plan: Decision, kind: str, tree: Any) -> None:
    """Raise UserError if `tree` is not what the plan has of a ``parameter`` or ``batch array``."""
    planned = plan.params if kind == "parameter" else plan.batch
    for path, shape in _same_paths(kind, planned, tree).items():
        if planned[path].shape != shape:
            raise UserError(f"{kind} {path!r} has shape {shape}; the plan was made for {planned[path].shape}")


def resized(plan: Decision, params: Any, batch: Any) -> Decision:
    """Return the same decision for arrays of other sizes, such as a model of fewer layers.

    Raises UserError if a path is missing or new, or if an axis does not divide a new size.
    """
    rows = {"params": _reshaped(plan, "parameter", params), "batch": _reshaped(plan, "batch array", batch)}
    dims = {}
    for name, dim in plan.dims.items():
        whole = (plan.params, plan.batch)[dim.argument][dim.path].shape[dim.dimension]
        size = rows["params" if dim.argument == 0 else "batch"][dim.path].shape[dim.dimension]
        if whole * dim.size % size and size * dim.size % whole:
            raise UserError(f"{name}={dim.size} of {dim.path!r} does not keep its share of {whole} in {size}")
        # A part of a dimension that is several in one grows and shrinks with the whole.
        dims[name] = dataclasses.replace(dim, size=dim.size * size // whole)
    return dataclasses.replace(plan.decision(), **rows, dims=dims)


def _reshaped(plan: Decision, kind: str, tree: Any) -> dict[str, ArrayPlan]:
    planned = plan.params if kind == "parameter" else plan.batch
    have = _same_paths(kind, planned, tree)
    for path, row in planned.items():
        if len(have[path]) != len(row.shape):
            raise UserError(f"{kind} {path!r} has shape {have[path]}, not one like {row.shape}")
    return {path: dataclasses.replace(row, shape=have[path]) for path, row in planned.items()}


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


def _specs_beside(plan: Decision, part: Any) -> Any:
    """Return the PartitionSpecs of a part of a training state other than its parameters."""

    def spec(keys: Any, leaf: Any) -> PartitionSpec:
        owner = by_suffix(path_of(keys), plan.params)
        return PartitionSpec(*(() if owner is None else _spec_of_moment(plan, owner, tuple(leaf.shape))))

    return jax.tree_util.tree_map_with_path(spec, part)


def _spec(plan: Decision, path: str, shape: tuple[int, ...], kind: str) -> Spec:
    planned: ArrayPlan | None = getattr(plan, kind).get(path)
    if planned is not None:
        if planned.shape != shape:
            raise UserError(f"{path!r} has shape {shape}; the plan was made for {planned.shape}")
        return planned.spec
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
