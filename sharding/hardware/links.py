"""Links that the traffic of each mesh axis crosses: between hosts, fast-fabric domains, slices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from .arrange import arrange
from .axes import resolve_axes
from .topology import Topology


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What the traffic along one mesh axis crosses; a group is the devices that differ in that axis alone."""

    size: int
    hosts: bool
    """Whether a group spans several hosts."""
    domains: bool
    """Whether a group spans several domains of the fast fabric: TPU slices, NVLink domains or hosts."""
    slices: bool
    """Whether a group spans several TPU slices."""
    extent: tuple[int, ...]
    """Chips of a group along each torus axis (1: it does not extend along it); empty without a torus."""
    whole: tuple[bool, ...]
    """For each torus axis, whether a group spans all of it, so that a wraparound link closes a ring."""

    @property
    def link(self) -> Literal["none", "chip", "fabric", "network"]:
        """The slowest link of the axis: inside a chip, the fast fabric (ICI, NVLink), or the network."""
        if self.size == 1:
            return "none"
        if self.domains:
            return "network"
        inside_chip = bool(self.extent) and math.prod(self.extent) == 1
        return "chip" if inside_chip else "fabric"


def reaches(axes: Mapping[str, int], topology: Topology) -> Mapping[str, Reach]:
    """Return what the traffic of each mesh axis crosses when `axes` are laid over `topology`.

    No device is touched.

    >>> reach = reaches({"data": 2, "tensor": 8}, Topology.parse("h100:2x8"))
    >>> reach["tensor"].link, reach["data"].link
    ('fabric', 'network')

    Raises:
      UserError: the axes do not fit the topology.
    """
    sizes = resolve_axes(axes, topology.num_devices)
    laid = arrange(sizes, topology)
    host, domain, within = homes(topology)
    found = {}
    for index, (axis, size) in enumerate(sizes.items()):
        groups = np.moveaxis(laid, index, 0).reshape(size, -1)
        extent = tuple(len(np.unique(coordinate[groups[:, 0]])) for coordinate in within)
        found[axis] = Reach(
            size=size,
            hosts=_differ(host[groups]),
            domains=_differ(domain[groups]),
            slices=topology.is_torus and _differ(domain[groups]),
            extent=extent,
            whole=tuple(n == all_of for n, all_of in zip(extent, topology.shape, strict=False)),
        )
    return MappingProxyType(found)


def _differ(groups: np.ndarray) -> bool:
    return bool((groups != groups[:1]).any())


def homes(topology: Topology) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Return for every position its host, its fast-fabric domain, and its coordinate on each torus axis.

    The arrays are [devices]; there are no coordinates without a torus.
    """
    positions = np.arange(topology.num_devices)
    domain = positions // topology.devices_per_domain
    if not topology.is_torus:
        return positions // topology.devices_per_host, domain, ()
    chip = positions % topology.devices_per_slice // topology.chip.devices_per_chip
    within = np.unravel_index(chip, topology.shape)
    block = topology.host_shape
    hosts = tuple(n // size for n, size in zip(topology.shape, block, strict=True))
    host = np.ravel_multi_index([c // size for c, size in zip(within, block, strict=True)], hosts)
    return domain * math.prod(hosts) + host, domain, tuple(within)


def describe(axes: Mapping[str, int], topology: Topology) -> str:
    """Return one line for each axis longer than 1 that names the links it runs over.

    >>> print(describe({"data": 2, "fsdp": 32, "tensor": 4}, Topology.parse("2*v5p:4x4x8")))
    data=2: data-centre network, across slices
    fsdp=32: ICI 1x4x8
    tensor=4: ICI 4x1x1
    """
    lines = []
    fabric = {"torus": "ICI", "switch": "NVLink", "full_mesh": "xGMI"}.get(
        topology.chip.fabric, "host memory"
    )
    for axis, reach in reaches(axes, topology).items():
        if reach.link == "none":
            continue
        shape = f" {'x'.join(map(str, reach.extent))}" if reach.extent and math.prod(reach.extent) > 1 else ""
        if reach.link == "network":
            where = f"data-centre network, across {'slices' if reach.slices else 'hosts'}"
            where += f"; {fabric}{shape} within" if shape else ""
        elif reach.link == "chip":
            where = "inside each chip"
        else:
            where = fabric + shape + (", across hosts" if reach.hosts and not shape else "")
        lines.append(f"{axis}={reach.size}: {where}")
    return "\n".join(lines)
