"""Mistakes of those who call jitted functions, in a sentence, where JAX would speak of its insides."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding

from ..errors import UserError
from ..paths import by_path
from ..program.jaxpr import Traced, is_array, is_extended
from ..program.leaves import gone, not_an_array
from ..program.lines import line_of

# What a loss is called with, in words.
OF_LOSS = ("parameters", "batch", "loss's state")


def not_arrays(args: Sequence[Any], names: Sequence[str]) -> str | None:
    """Say which leaf of arguments of these names is nothing to compute with, or None if there is none."""
    for name, tree in zip(names, args, strict=False):
        for path, leaf in by_path(tree).items():
            where = f"{path!r} of the {name}" if path else f"the {name}"
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return f"{where} is a ShapeDtypeStruct, which has no numbers: give arrays"
            if hasattr(leaf, "__jax_array__"):
                continue
            if (said := not_an_array(leaf)) is not None:
                return f"{where} is {said}"
    return None


def check_given(args: Sequence[Any], names: Sequence[str]) -> None:
    """Raise UserError if a leaf of arguments of these names is nothing to compute with, or was deleted."""
    if said := not_arrays(args, names) or not_there(args, names):
        raise UserError(said)


def not_there(args: Sequence[Any], names: Sequence[str]) -> str | None:
    """Say which array of arguments of these names was deleted, or None if all are there.

    XLA of JAX 0.10 ends the process where several devices hold it.
    """
    for name, tree in zip(names, args, strict=False):
        if (path := gone(tree)) is not None:
            where = f"{path!r} of the {name}" if path else f"the {name}"
            return (
                f"{where} was deleted: a step that it was given to took its memory (donation); go on with "
                "what that returned, or give a copy"
            )
    return None


def other_devices(mesh: Any) -> str | None:
    """Say that the mesh that the caller has set is of other devices than `mesh`, or None if it is not."""
    try:
        around = jax.sharding.get_mesh()
    except ValueError:
        # Within what is being traced only sizes are known.
        around = jax.sharding.get_abstract_mesh()
        if around.empty or around.size == mesh.size:
            return None
        return _of_other_size(around.size, mesh.size)
    if not isinstance(mesh, Mesh) or not isinstance(around, Mesh) or around.empty:
        return None
    own, found = ([device.id for device in one.devices.flat] for one in (mesh, around))
    if own == found:
        return None
    if len(own) != len(found):
        return _of_other_size(len(found), len(own))
    how = "the same devices in another order" if sorted(own) == sorted(found) else "other devices"
    return (
        f"the mesh that jax.set_mesh has set is of {how} than the plan's ({found[:4]}… and {own[:4]}…): set "
        "plan.make_mesh(), or none"
    )


def _of_other_size(found: int, own: int) -> str:
    return (
        f"the mesh that jax.set_mesh has set has {found} devices, the plan's {own}: set plan.make_mesh(), "
        "or none"
    )


def lying_elsewhere(args: Sequence[Any], names: Sequence[str], mesh: Any) -> str | None:
    """Say which array was put on other devices than the mesh's, or None if none was."""
    if not isinstance(mesh, Mesh):
        return None
    own = set(mesh.devices.flat)
    for name, tree in zip(names, args, strict=False):
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not is_array(leaf) or not leaf.committed:
                continue
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            where, count = f"{path!r} of the {name}" if path else f"the {name}", len(leaf.sharding.device_set)
            if leaf.sharding.device_set == own:
                if not _in_other_order(leaf.sharding, mesh):
                    continue
                return (
                    f"{where} was put on the plan's devices in another order, by a mesh of its own: put it "
                    "where plan.shardings says, or leave it on the host"
                )
            return (
                f"{where} was put on other devices ({count}) than the plan's ({len(own)}): put it where "
                "plan.shardings says, or leave it on the host"
            )
    return None


def check_laid_by_loss(traced: Traced, mesh: Any) -> Traced:
    """Return `traced`, of a loss.

    Raises UserError, with the line, if the loss itself lays arrays out (`jax.shard_map`, a constraint) over
    other devices than those of `mesh`, or over these in another order: JAX runs no program on both.
    """
    if isinstance(mesh, Mesh):
        own = [*mesh.devices.flat]
        for eqn in _equations(traced.jaxpr.jaxpr):
            for over in _devices_in(eqn.params):
                if over == own:
                    continue
                which = f"{len(over)} device{'s' * (len(over) != 1)}, the plan's mesh has {len(own)}"
                if len(over) == len(own):
                    which = f"{len(own)} devices in another order than the plan's mesh, or over others"
                raise UserError(
                    f"the loss itself lays arrays over {which}, at {line_of(eqn)}: leave that to the plan, "
                    "or make its mesh of plan.make_mesh().devices"
                )
    return traced


def _equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _equations(inner)


def _devices_in(params: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield the devices, in their order, of each mesh and sharding among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            mesh = one.mesh if isinstance(one, NamedSharding) else one
            if isinstance(mesh, Mesh) and not mesh.empty:
                yield [*mesh.devices.flat]
            elif isinstance(one, jax.sharding.SingleDeviceSharding):
                yield [*one.device_set]


def _in_other_order(sharding: Any, mesh: Mesh) -> bool:
    """Whether a sharding is by a mesh of the same devices in another order, which JAX runs no program on."""
    other = getattr(sharding, "mesh", None)
    return isinstance(other, Mesh) and [*other.devices.flat] != [*mesh.devices.flat]


def is_key(value: Any) -> bool:
    """Whether `value` is a random key of JAX's, typed or raw."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return False
    return np.ndim(value) == (0 if is_extended(dtype) else 1) and (is_extended(dtype) or dtype == np.uint32)


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether `function` can be called with `count` arguments; true where Python does not know."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        pass
    return True


def donated(args: Sequence[Any]) -> str | None:
    """Say that the first argument is a training state that an earlier step was given, or None if it is not.

    Its arrays are gone then; XLA of JAX 0.10 ends the process where several devices hold them.
    """
    step = args[0].get("step") if args and isinstance(args[0], dict) else None
    if step is None or not is_array(step) or not step.is_deleted():
        return None
    return "this state was given to an earlier step, which took its arrays: go on with what that returned"


def other_count(what: str, args: Sequence[Any], names: Sequence[str], least: int) -> str | None:
    """Say that `what` got too few arguments or too many of those called `names`; `least` are needed."""
    if least <= len(args) <= len(names):
        return None
    wanted = ", ".join(names[: max(least, 1)])
    return f"{what} takes ({wanted}) and was given {len(args)} argument{'s' * (len(args) != 1)}"


def positional(
    function: Callable[..., Any],
    args: Sequence[Any],
    named: Mapping[str, Any],
    what: str = "the planned loss",
) -> Sequence[Any]:
    """Return the arguments of a call of `function` by their positions.

    Raises UserError if `what` it is called has no such arguments.
    """
    if not named:
        return args
    try:
        return inspect.signature(function).bind(*args, **named).args
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} cannot be called so: {error}") from None


def within_manual() -> str | None:
    """Say that a planned loss is called where devices work by themselves, or None if it is not."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = [str(axis) for axis, kind in kinds if kind == AxisType.Manual]
    if not axes:
        return None
    return (
        f"plan.apply is called within jax.shard_map or jax.pmap (over {', '.join(axes)}), where each device "
        "has its part alone; the plan shares a whole batch out itself: call it outside, with all rows"
    )
