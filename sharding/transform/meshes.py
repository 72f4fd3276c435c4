"""Meshes as users make them, brought to what a plan's shardings are written for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from ..errors import UserError
from ..hardware.mesh import check_mesh
from ..plans.record import Decision
from ..program.recognise import usual_promotion


def of_plan(plan: Decision, mesh: Mesh | AbstractMesh) -> Any:
    """Return `mesh` with the plan's axes, of automatic types.

    `jax.make_mesh` gives axes that say in the type of every array how it lies (explicit ones); a plan says it
    by constraints instead. The order of the axes may be another, axes of one device may be missing or more.

    Raises:
      UserError: its axes are not the plan's.
    """
    check_mesh(mesh)
    have = {axis: size for axis, size in mesh.shape.items() if size > 1}
    wanted = {axis: size for axis, size in plan.mesh.items() if size > 1}
    if have != wanted:
        raise UserError(
            f"the mesh is {_written(have)}, the plan's {_written(wanted)}; give it plan.make_mesh(), "
            "or plan for this mesh"
        )
    whole = set(plan.mesh) <= set(mesh.axis_names)
    if whole and all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    names = tuple(mesh.axis_names) if whole else (*have, *(axis for axis in plan.mesh if axis not in have))
    sizes = tuple({**plan.mesh, **dict(mesh.shape)}[axis] for axis in names)
    types = (AxisType.Auto,) * len(names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(sizes, names, axis_types=types)
    return Mesh(mesh.devices.reshape(sizes), names, axis_types=types)


@contextlib.contextmanager
def automatic(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Within it, what is traced lies as a plan's constraints say, whatever mesh the caller has set.

    Arrays meet there as they do by default, see `usual_promotion`.
    """
    own = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    around = jax.sharding.get_abstract_mesh()
    by_hand = AxisType.Manual in around.axis_types
    others = around.axis_names and not by_hand and dict(around.shape) != dict(own.shape)
    with contextlib.ExitStack() as stack:
        stack.enter_context(usual_promotion())
        if others or explicit_axes():
            stack.enter_context(jax.sharding.use_abstract_mesh(own))
        yield


def constraint(mesh: Mesh | AbstractMesh) -> Callable[[Any, NamedSharding], Any]:
    """Return what says of an array on `mesh` how it lies; where every axis is manual there is nothing to say.

    JAX batches a constraint by what only an automatic axis takes.
    """
    return _as_it_is if is_manual(mesh) else jax.lax.with_sharding_constraint


def is_manual(mesh: Mesh | AbstractMesh) -> bool:
    """Whether every axis of `mesh` is manual."""
    return all(kind == AxisType.Manual for kind in mesh.axis_types)


def _as_it_is(value: Any, sharding: NamedSharding) -> Any:
    return value


def explicit_axes() -> tuple[str, ...]:
    """Return the axes of the mesh that the caller has set whose types are explicit."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind == AxisType.Explicit)


def by_device(function: Callable[..., Any], mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any) -> Any:
    """Return `function` run by each device on its parts; axes that are manual already stay what they are.

    Kernels and sums within do not say over which axes their results vary.
    """
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {axis for axis, kind in kinds if kind != AxisType.Manual}
    if not free:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False
    )


def with_automatic_axes(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """Return a mesh's axes as they are outside of all regions, for what asks how arrays divide."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return AbstractMesh(tuple(mesh.shape.values()), tuple(mesh.axis_names), axis_types=types)


def _written(axes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in axes.items()) if axes else "one device"
