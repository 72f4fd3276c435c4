"""Collectives of each kind and size, timed over each axis: the devices of a host, and the hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .kernels import Row
from .loops import Clock

FABRIC, NETWORK = "fabric", "network"
# Bytes that a group holds together.
_SIZES = (2**16, 2**20, 2**23, 2**26)
_CPU_SIZES = (2**14, 2**18, 2**21)


def axes(devices: Sequence[Any]) -> dict[str, Mesh]:
    """Return axis → a mesh of one axis over it: a process's devices, and one device of each process."""
    own = [one for one in devices if one.process_index == jax.process_index()]
    first = {one.process_index: one for one in reversed(devices)}
    found = {FABRIC: own, NETWORK: [first[process] for process in sorted(first)]}
    return {name: Mesh(np.array(group), (name,)) for name, group in found.items() if len(group) > 1}


def collectives(clock: Clock, devices: Sequence[Any]) -> Iterator[Row]:
    """Yield each collective of each size over each axis that has several devices."""
    sizes = _CPU_SIZES if devices[0].platform == "cpu" else _SIZES
    for axis, mesh in axes(devices).items():
        if jax.process_index() not in {one.process_index for one in mesh.devices.flat}:
            continue
        count = mesh.size
        cut, whole = PartitionSpec(axis), PartitionSpec()
        for kind, function, taken, given in (
            ("all_gather", lambda x, a=axis: jax.lax.all_gather(x, a, tiled=True), cut, whole),
            ("all_reduce", lambda x, a=axis: jax.lax.psum(x, a), whole, whole),
            ("reduce_scatter", lambda x, a=axis: jax.lax.psum_scatter(x, a, tiled=True), whole, cut),
        ):
            for size in sizes:
                elements = size // 4 // count * count
                array = jax.device_put(jnp.zeros(elements, jnp.float32), NamedSharding(mesh, taken))
                mapped = jax.shard_map(function, mesh=mesh, in_specs=taken, out_specs=given, check_vma=False)
                seconds = clock.seconds(mapped, array)
                if seconds is not None:
                    yield {
                        "kind": kind,
                        "axis": axis,
                        "devices": count,
                        "bytes": 4 * elements,
                        "seconds": seconds,
                    }
