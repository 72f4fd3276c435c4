"""Shardings that hold every byte once, for reading and copying without doing the work on each replica."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ...sharding.plans.specs import axes_of
from .leaves import by_devices


def spread(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Refine `sharding` over the mesh axes that replicate an array of `shape`, as far as they divide it.

    Each device keeps a part of what it held, so going from `sharding` to the result moves nothing.
    Shardings other than `NamedSharding`s come back as they are.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    entries = [axes_of(entry) for entry in sharding.spec] + [()] * (len(shape) - len(sharding.spec))
    free = [axis for axis in mesh.axis_names if axis not in {a for entry in entries for a in entry}]
    for axis in sorted(free, key=lambda axis: -mesh.shape[axis]):
        for dim, size in enumerate(shape):
            parts = math.prod(mesh.shape[a] for a in entries[dim]) * mesh.shape[axis]
            if size % parts == 0 and size:
                entries[dim] = (*entries[dim], axis)
                break
    spec = PartitionSpec(*(entry or None for entry in entries))
    return NamedSharding(mesh, spec, memory_kind=sharding.memory_kind)


def snapshot(leaves: Sequence[jax.Array], spare: Sequence[jax.Array] | None = None) -> list[jax.Array]:
    """Return what a save may keep reading while the training step is given the buffers of `leaves`.

    On CPU the devices' memory is the host's: Orbax would hold views of it, and the next step, refused its
    donated buffers, would allocate the state anew. So each byte is copied once, by all devices together,
    into the buffers of `spare`, an earlier snapshot of the same state that nobody reads any more: fresh
    memory costs the system three times what the copying does. Elsewhere the copy to host memory that Orbax
    makes does all this, and `leaves` come back as they are.
    """
    copied = list(leaves)
    for group in _on_cpu(leaves):
        held = tuple(leaves[i] for i in group)
        if spare is None:
            copies = _copier(_targets(held))(held)
        else:
            copies = _recopier(_targets(held))(held, tuple(spare[i] for i in group))
        for index, copy in zip(group, copies, strict=True):
            copied[index] = copy
    return copied


def prepare(leaves: Sequence[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    """Compile what `snapshot` runs on arrays such as `leaves`; returns what it will make of them."""
    made = list(leaves)
    for group in _on_cpu(leaves):
        held = tuple(leaves[i] for i in group)
        copies = tuple(_spread_out(leaf) for leaf in held)
        _copier(_targets(held)).lower(held).compile()
        _recopier(_targets(held)).lower(held, copies).compile()
        for index, copy in zip(group, copies, strict=True):
            made[index] = copy
    return made


class Snapshots:
    """Snapshots one after the other, each in the memory of the one before it where that is free again."""

    def __init__(self) -> None:
        self._spare: list[jax.Array] | None = None

    def take(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """Return `snapshot` of `leaves`."""
        spare, self._spare = self._spare, None
        wanted = [(leaf.shape, leaf.dtype, spread(leaf.sharding, leaf.shape)) for leaf in leaves]
        fits = spare is not None and [(s.shape, s.dtype, s.sharding) for s in spare] == wanted
        return snapshot(leaves, spare if fits else None)

    def give_back(self, copies: list[jax.Array]) -> None:
        """Take a snapshot that nobody reads any more, unless it is the training state itself."""
        if len(_on_cpu(copies)) == len(by_devices(copies)):
            self._spare = copies


def _on_cpu(leaves: Sequence[Any]) -> list[list[int]]:
    groups = by_devices(leaves)
    return [g for g in groups if all(d.platform == "cpu" for d in leaves[g[0]].sharding.device_set)]


def _spread_out(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=spread(leaf.sharding, leaf.shape), weak_type=leaf.weak_type
    )


def _targets(leaves: Sequence[Any]) -> tuple[Sharding, ...]:
    return tuple(spread(leaf.sharding, leaf.shape) for leaf in leaves)


@functools.cache
def _copier(targets: tuple[Sharding, ...]) -> Any:
    return jax.jit(lambda leaves: tuple(jnp.copy(leaf) for leaf in leaves), out_shardings=targets)


@functools.cache
def _recopier(targets: tuple[Sharding, ...]) -> Any:
    return jax.jit(
        lambda leaves, spare: tuple(jnp.copy(leaf) for leaf in leaves),
        out_shardings=targets,
        donate_argnums=1,
        keep_unused=True,
    )


def resharded(leaves: list[jax.Array], targets: Sequence[Sharding]) -> list[jax.Array]:
    """Bring `leaves`, read with `spread` shardings, to `targets` by collectives.

    The list is emptied on the way, so that no more than one leaf exists in both shardings.
    """
    result = []
    for target in targets:
        leaf = leaves.pop(0)
        result.append(leaf if leaf.sharding == target else _mover(target)(leaf))
    return result


@functools.cache
def _mover(target: Sharding) -> Any:
    return jax.jit(lambda leaf: leaf, out_shardings=target)
