"""How long a collective takes over the links that a mesh axis runs on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..hardware.axes import AXES_BY_WEIGHT
from ..hardware.chip import Chip
from ..hardware.links import reaches
from ..hardware.topology import Topology
from . import nccl
from .calibration import Calibration

# Starts of a device and of a domain for which the figures of `nccl` hold; they change in proportion to these.
_NCCL_FABRIC_SECONDS, _NCCL_NETWORK_SECONDS = 1e-6, 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What one mesh axis runs on.

    size:                devices of a group.
    bytes_per_second:    one device's share of what a ring (or all rings at once) carries, one way.
    point_bytes_per_second: to the next device of the group alone.
    exchange_bytes_per_second: what a device holds of an array over the seconds that exchanging it with all
                         others of the group takes; where not given, those of a switch.
    seconds:             start of one collective, all hops together.
    network:             whether it leaves the fast fabric.
    ways:                kind → the ways that a library has of carrying it out, their starts included; none of
                         a kind that goes by rings, or one after the other.
    """

    size: int
    bytes_per_second: float
    point_bytes_per_second: float
    seconds: float
    network: bool
    exchange_bytes_per_second: float | None = None
    ways: Mapping[str, nccl.Ways] = dataclasses.field(default_factory=dict)

    @property
    def is_torus(self) -> bool:
        """Whether it runs over links from device to device rather than through a switch."""
        return self.exchange_bytes_per_second is not None

    def collective(self, kind: str, bytes_: float, count: float = 1.0) -> float:
        """Return the seconds of `count` collectives that move `bytes_` together.

        `bytes_` is what a group holds together of the array gathered, scattered or reduced.

        By rings (Thakur et al. 2005): in n - 1 steps each device of an all-gather passes on the others'
        parts, 1 / n each, together (n - 1) / n of the array; a reduce-scatter is the same backwards; an
        all-reduce is one after the other, twice that. In an all-to-all each device holds 1 / n and keeps
        1 / n of that: (n - 1) / n of 1 / n leaves it.
        """
        return self.transfer(kind, bytes_, count) + self.starts(kind, count)

    def transfer(self, kind: str, bytes_: Any, count: Any = 1.0) -> Any:
        """Return the seconds that the links are busy, of numbers or of arrays alike; see `collective`.

        With ways to choose from, the starts of `count` are among them: the device waits in them.
        """
        if self.size == 1:
            return 0.0 * bytes_
        if kind in self.ways:
            return self.ways[kind].seconds(bytes_, count)
        # Around a torus it goes as far as it must: see `torus_link`.
        if kind == "all_to_all" and self.exchange_bytes_per_second is not None:
            return bytes_ / self.size / self.exchange_bytes_per_second
        share = (self.size - 1) / self.size
        return _passes(kind, self.size) * share * bytes_ / self.bytes_per_second

    def starts(self, kind: str, count: float) -> float:
        """Return the seconds before the first and after the last byte of `count` collectives.

        An all-reduce starts twice: its reduce-scatter, then its all-gather.
        """
        if self.size == 1 or kind in self.ways:
            return 0.0
        return count * self.seconds * (2.0 if kind == "all_reduce" else 1.0)

    def point_to_point(self, bytes_: float, count: float = 1.0) -> float:
        """Return the seconds of `count` sends of `bytes_` together to the next device of the group."""
        if self.size == 1:
            return 0.0
        # `seconds` are those of a way through all of the group, n - 1 hops; a send is one.
        return bytes_ / self.point_bytes_per_second + count * self.seconds / max(self.size - 1, 1)


def _passes(kind: str, size: int) -> float:
    """Return how often the whole of what a group holds goes through each device's link."""
    return {"all_gather": 1.0, "reduce_scatter": 1.0, "all_reduce": 2.0, "all_to_all": 1.0 / size}[kind]


def links(mesh: Mapping[str, int], topology: Topology, calibration: Calibration) -> Mapping[str, Link]:
    """Return the link of every mesh axis longer than 1, laid over `topology` as `arrange` does."""
    return _links(tuple((axis, size) for axis, size in mesh.items() if size > 1), topology, calibration)


@functools.lru_cache(maxsize=4096)
def _links(
    mesh: tuple[tuple[str, int], ...], topology: Topology, calibration: Calibration
) -> Mapping[str, Link]:
    sizes = dict(mesh)
    if topology.is_torus and sizes:
        return _torus_links(sizes, topology, calibration)
    return {
        axis: _joint(size, inside, topology.chip, calibration)
        for axis, (size, inside) in switched_groups(sizes, topology).items()
    }


def switched_groups(mesh: Mapping[str, int], topology: Topology) -> dict[str, tuple[int, int]]:
    """Return mesh axis → (devices of a group, how many of them stand on each fast domain).

    The heaviest axis runs over consecutive devices, the next one over strides of its size (`arrange`), so
    that an axis has as many members on a domain as strides fit into it.

    >>> switched_groups({"data": 4, "tensor": 8}, Topology.parse("h100:4x8"))
    {'tensor': (8, 8), 'data': (4, 1)}
    """
    found, stride = {}, 1
    for axis in sorted((axis for axis, size in mesh.items() if size > 1), key=AXES_BY_WEIGHT.index)[::-1]:
        size = mesh[axis]
        found[axis] = size, max(1, min(size, topology.devices_per_domain // stride))
        stride *= size
    return found


def joint_link(
    mesh: Mapping[str, int], topology: Topology, calibration: Calibration, axes: Sequence[str]
) -> Link:
    """Return the link of groups of a switch that lie over several `axes` at once."""
    groups = switched_groups(mesh, topology)
    size, inside = (math.prod(groups[axis][n] for axis in axes if axis in groups) for n in (0, 1))
    return _joint(size, inside, topology.chip, calibration)


@functools.lru_cache(maxsize=1024)
def _joint(size: int, inside: int, chip: Chip, calibration: Calibration) -> Link:
    return switched_link(size, inside, chip, calibration)


def _fabric_rate(chip: Chip, calibration: Calibration) -> float:
    rate = chip.fabric_bytes_per_second_per_chip or chip.link_bytes_per_second or math.inf
    return rate / chip.devices_per_chip * calibration.fabric_efficiency


def _network_rate(chip: Chip, calibration: Calibration) -> float:
    rate = chip.dcn_bytes_per_second_per_chip
    if rate is None:
        return _fabric_rate(chip, calibration)
    return rate / chip.devices_per_chip * calibration.network_efficiency


def switched_link(size: int, inside: int, chip: Chip, calibration: Calibration) -> Link:
    """Return the link of a group of `size`, `inside` on each fast domain, as the chip's library uses it."""
    link = ring_link(size, inside, chip, calibration)
    if chip.vendor != "NVIDIA" or chip.fabric != "switch" or size < 2:
        return link
    group = nccl.Group(
        size=size,
        domains=math.ceil(size / inside),
        link=_fabric_rate(chip, calibration),
        network=_network_rate(chip, calibration),
        switch_sums=chip.switch_sums,
        step=calibration.fabric_seconds / _NCCL_FABRIC_SECONDS,
        hop=calibration.network_seconds / _NCCL_NETWORK_SECONDS,
    )
    return dataclasses.replace(link, ways=nccl.ways(group))


def ring_link(size: int, inside: int, chip: Chip, calibration: Calibration) -> Link:
    """Return the link of a group of `size` with `inside` members on each fast domain, used by rings alone.

    A ring that leaves a domain enters and leaves through the adapters of all its members there: it is as fast
    as the slower of one device's fast links and the adapters together.
    """
    fabric = _fabric_rate(chip, calibration)
    if inside == size:
        return Link(
            size=size,
            bytes_per_second=fabric,
            point_bytes_per_second=fabric,
            seconds=calibration.fabric_seconds * (size - 1),
            network=False,
        )
    network = _network_rate(chip, calibration)
    domains = math.ceil(size / inside)
    return Link(
        size=size,
        bytes_per_second=min(fabric, inside * network),
        point_bytes_per_second=network,
        # A start at each device visited, and at each border between domains.
        seconds=calibration.fabric_seconds * (size - 1) + calibration.network_seconds * (domains - 1),
        network=True,
    )


def _torus_links(sizes: Mapping[str, int], topology: Topology, calibration: Calibration) -> dict[str, Link]:
    return {
        axis: torus_link(
            size=reach.size,
            extent=reach.extent,
            whole=reach.whole,
            crosses_slices=reach.domains,
            topology=topology,
            calibration=calibration,
        )
        for axis, reach in reaches(sizes, topology).items()
        if reach.size > 1
    }


def torus_link(
    *,
    size: int,
    extent: tuple[int, ...],
    whole: tuple[bool, ...],
    crosses_slices: bool,
    topology: Topology,
    calibration: Calibration,
    drives: int | None = None,
    sharing: int = 1,
) -> Link:
    """Return the link of a group of `size` devices that touches `extent` chips along each torus axis.

    Every axis that a group spans is a ring of its own: driven both ways where a wraparound link closes it,
    one way's worth where it is open, since its middle link then carries half of everything each way. All axes
    at once carry what they carry together (scaling book, "Sharded Matrices", over several axes).

    An all-to-all does not go round: on an axis of k chips that wraps, data goes k / 4 hops on average, over
    two directions, so that a link carries k / 8 of what a chip holds; the middle link of an open axis carries
    k / 4 of it. The axes are used at once, so that the longest one tells (the same: a quarter of an
    all-gather).

    Args:
      size: devices of the group, over all slices.
      extent: chips of it along each torus axis, 1 where it does not reach.
      whole: for each torus axis, whether the extent is all of it.
      crosses_slices: whether the group spans all slices, over the data-centre network.
      topology: what the chips are wired as.
      calibration: the efficiency and the start of collectives.
      drives: directed links that the algorithm uses at once; all those there are if not given.
      sharing: groups that use the same chips' links at once, as when each core of a chip is in its own.
    """
    one = (topology.chip.link_bytes_per_second or math.inf) * calibration.fabric_efficiency / sharing
    rate, hops, fullest = 0.0, 0, 0.0
    for chips, all_of, wrap in zip(extent, whole, topology.wrap, strict=True):
        if chips > 1:
            closed = all_of and wrap
            fullest = max(fullest, chips / (8 if closed else 4))
            rate += one * (2 if closed else 1)
            hops += chips // 2 if closed else chips - 1
    if drives is not None:
        rate = min(rate, one * drives)
    if rate == 0.0:
        rate = (topology.chip.core_link_bytes_per_second or one) * calibration.fabric_efficiency
    seconds = calibration.fabric_seconds * max(hops, 1)
    point = min(rate, one)
    # The cores of a chip that are both in the group put twice as much on its links.
    cores = topology.chip.devices_per_chip / sharing
    exchange = one / (fullest * cores) if fullest and not crosses_slices else None
    if crosses_slices:
        inside = max(1, size // topology.num_slices)
        network = inside * _network_rate(topology.chip, calibration)
        rate = min(rate, network) if inside > 1 else network
        point = _network_rate(topology.chip, calibration)
        seconds += calibration.network_seconds * (topology.num_slices - 1)
    return Link(
        size=size,
        bytes_per_second=rate,
        point_bytes_per_second=point,
        seconds=seconds,
        network=crosses_slices,
        exchange_bytes_per_second=exchange,
    )
