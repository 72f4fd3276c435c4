"""Mistakes of those who call jitted functions, in a sentence, where JAX would speak of its insides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ..program.jaxpr import is_array


def not_arrays(args: Sequence[Any], names: Sequence[str]) -> str | None:
    """Say which leaf of arguments of these names is nothing to compute with, or None if there is none."""
    for name, tree in zip(names, args, strict=False):
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if _is_array(leaf):
                continue
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            kind = "function" if callable(leaf) else type(leaf).__name__
            where = f"{path!r} of the {name}" if path else f"the {name}"
            said = f"{where} is a {kind}, which is no array of numbers"
            return f"{said}: leave it out, or close over it in the loss"
    return None


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind not in "OUSMm"
    return (
        isinstance(leaf, (bool, int, float, complex))
        or hasattr(leaf, "dtype")
        or hasattr(leaf, "__jax_array__")
    )


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
            if not is_array(leaf) or not leaf.committed or leaf.sharding.device_set == own:
                continue
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            where, count = f"{path!r} of the {name}" if path else f"the {name}", len(leaf.sharding.device_set)
            return (
                f"{where} was put on other devices ({count}) than the plan's ({len(own)}): put it where "
                "plan.shardings says, or leave it on the host"
            )
    return None
