"""Shardings that hold every byte once, for reading and copying without doing the work on each replica."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .leaves import by_devices


def spread(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Refine `sharding` over the mesh axes that replicate an array of `shape`, as far as they divide it.

    Each device keeps a part of what it held, so going from `sharding` to the result moves nothing.
    Shardings other than `NamedSharding`s come back as they are.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    entries = [_axes(entry) for entry in sharding.spec] + [()] * (len(shape) - len(sharding.spec))
    free = [axis for axis in mesh.axis_names if axis not in {a for entry in entries for a in entry}]
    for axis in sorted(free, key=lambda axis: -mesh.shape[axis]):
        for dim, size in enumerate(shape):
            parts = math.prod(mesh.shape[a] for a in entries[dim]) * mesh.shape[axis]
            if size % parts == 0 and size:
                entries[dim] = (*entries[dim], axis)
                break
    spec = PartitionSpec(*(entry or None for entry in entries))
    return NamedSharding(mesh, spec, memory_kind=sharding.memory_kind)


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def snapshot(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Return what a save may keep reading while the training step is given the buffers of `leaves`.

    On CPU the devices' memory is the host's: Orbax would hold views of it, and the next step, refused its
    donated buffers, would allocate the state anew. So each byte is copied once, by all devices together.
    Elsewhere the copy to host memory that Orbax makes does this, and `leaves` come back as they are.
    """
    if any(device.platform != "cpu" for leaf in leaves for device in leaf.sharding.device_set):
        return leaves
    targets = tuple(spread(leaf.sharding, leaf.shape) for leaf in leaves)
    copied = list(leaves)
    for group in by_devices(leaves):
        copies = _copier(tuple(targets[i] for i in group))(tuple(leaves[i] for i in group))
        for index, copy in zip(group, copies, strict=True):
            copied[index] = copy
    return tuple(copied)


def resharded(leaves: list[jax.Array], targets: Sequence[Sharding]) -> list[jax.Array]:
    """Bring `leaves`, read with `spread` shardings, to `targets` by collectives.

    The list is emptied on the way, so that no more than one leaf exists in both shardings.
    """
    result = []
    for target in targets:
        leaf = leaves.pop(0)
        result.append(leaf if leaf.sharding == target else _mover(target)(leaf))
    return result


_copiers: dict[tuple[Sharding, ...], Any] = {}
_movers: dict[Sharding, Any] = {}


def _copier(targets: tuple[Sharding, ...]) -> Any:
    if targets not in _copiers:
        _copiers[targets] = jax.jit(
            lambda leaves: tuple(jnp.copy(leaf) for leaf in leaves), out_shardings=targets
        )
    return _copiers[targets]


def _mover(target: Sharding) -> Any:
    if target not in _movers:
        _movers[target] = jax.jit(lambda leaf: leaf, out_shardings=target)
    return _movers[target]
