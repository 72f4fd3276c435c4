"""Seconds of compiled collectives over the links that their algorithms use.

The link model is the planner's (`meshwright.sharding.cost.collectives`), applied to the devices of a group
rather than to a mesh axis, and limited to the links that the algorithm uses at once. A permute does not run
round a ring: on a torus each of its pairs takes the shortest path, one torus axis after the other, and the
time is that of the link with the most pairs. A link carries one direction, so that two permutes in opposite
directions do not slow each other down.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..cost.calibration import Calibration
from ..cost.collectives import Link, switched_link, torus_link
from ..hardware.arrange import arrange
from ..hardware.links import homes
from ..hardware.topology import Topology
from ..hlo.replica_groups import Groups
from ..hlo.text import Instruction
from ..xla.compiler import compiler_of

# Bytes that a device sends, over those of the result (all-gather) or of the operand (the others), by the
# number of devices in a group: on a ring (Patarasuk and Yuan, 2009).
_SENT = {
    "all_gather": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "ragged_all_to_all": lambda n: (n - 1) / n,
    "collective_permute": lambda n: 1.0,
    "collective_broadcast": lambda n: 1.0,
}

# What has parts of an array on each device before or after, and the directed links that one ring of it uses.
_CUT, _RING_DRIVES = ("all_gather", "reduce_scatter"), 2


def wire_bytes(kind: str, size: int, whole_bytes: float) -> float:
    """Return the bytes that one device sends in a collective over a ring.

    >>> wire_bytes("all_gather", 4, 1024.0)
    768.0

    Args:
      kind: one of `hlo.text.COLLECTIVES`.
      size: devices in the ring.
      whole_bytes: bytes of the result of an all-gather, of the operand of the others.
    """
    return 0.0 if size < 2 else _SENT[kind](size) * whole_bytes


@dataclass(frozen=True, kw_only=True)
class Span:
    """Positions of a group's devices.

    Attributes:
      size: devices of the group.
      extent: chips along each torus axis, empty without a torus.
      whole: for each torus axis, whether the group spans all of it.
      crosses_slices: whether it spans several slices or domains.
      inside: devices in one slice or domain.
      sharing: groups that use the same links at once, as those of a chip's other devices do.
      resources: links that its traffic occupies, such as ``("torus", 0, 1)`` (an axis and a direction) or
        ``("network",)``. Operations that run at once over the same ones share them.
    """

    size: int
    extent: tuple[int, ...]
    whole: tuple[bool, ...]
    crosses_slices: bool
    inside: int
    sharing: int
    resources: frozenset[tuple[object, ...]]

    @property
    def is_uneven(self) -> bool:
        """Whether the group lies along several torus axes, and has a part of one of them."""
        spans = [whole for chips, whole in zip(self.extent, self.whole, strict=True) if chips > 1]
        return len(spans) > 1 and not all(spans)


@dataclass(frozen=True, kw_only=True)
class _Load:
    """Traffic of a permute: the most pairs over one link, all its links, a pair that leaves its slice."""

    most: float
    resources: frozenset[tuple[object, ...]] = frozenset()
    crossing: Groups = ()


class Fabric:
    """Links between the devices of a mesh, which are numbered in the order of ``mesh.devices.flat``."""

    def __init__(self, topology: Topology, mesh: Mapping[str, int], calibration: Calibration) -> None:
        self.topology = topology
        self.calibration = calibration
        position = arrange(mesh, topology).reshape(-1)
        _, domain, within = homes(topology)
        self._domain = domain[position]
        self._within = tuple(coordinate[position] for coordinate in within)
        self._spans: dict[Groups, Span] = {}
        self._loads: dict[Groups, _Load] = {}

    def span(self, groups: Groups) -> Span:
        """Return the span of the largest group; the groups of one collective are alike."""
        if groups not in self._spans:
            self._spans[groups] = self._find(groups)
        return self._spans[groups]

    def first_slice(self) -> tuple[int, ...]:
        """Return the devices of the first slice (or fast-fabric domain), in mesh order."""
        return tuple(int(place) for place in np.flatnonzero(self._domain == 0))

    def across_slices(self) -> Groups:
        """Return the groups of devices that have the same position in each slice, in mesh order."""
        rows = [np.flatnonzero(self._domain == domain) for domain in np.unique(self._domain)]
        return tuple(tuple(int(place) for place in group) for group in zip(*rows, strict=True))

    def resources(self, kind: str, groups: Groups) -> frozenset[tuple[object, ...]]:
        """Return the links that one collective occupies; for a permute, those on the paths of its pairs."""
        if kind == "collective_permute" and (used := self._load(groups).resources):
            return used
        return self.span(groups).resources

    def seconds(self, kind: str, groups: Groups, algorithm: Algorithm, whole_bytes: float) -> float:
        """Return the seconds for which one collective occupies its links.

        Args:
          kind: one of `hlo.text.COLLECTIVES`.
          groups: devices by their place in the mesh; of a permute (source, target) pairs.
          algorithm: by which it is carried out.
          whole_bytes: as `wire_bytes` takes them.
        """
        if kind == "collective_permute":
            return self._permute(groups, whole_bytes)
        span = self.span(groups)
        if span.size < 2:
            return 0.0
        drives = algorithm.drives
        if drives is None and kind in _CUT and compiler_of(self.topology).one_ring and span.is_uneven:
            drives = _RING_DRIVES
        link = self._link(span, drives)
        if kind in ("all_to_all", "ragged_all_to_all"):
            return link.collective("all_to_all", whole_bytes * span.size)
        if kind == "collective_broadcast":
            return whole_bytes / link.bytes_per_second + link.starts(kind, 1.0)
        return link.collective(kind, whole_bytes)

    def _find(self, groups: Groups) -> Span:
        first = np.asarray(max(groups, key=lambda group: len(set(group)), default=()), int)
        domains = np.unique(self._domain[first])
        extent = tuple(len(np.unique(coordinate[first])) for coordinate in self._within)
        topology = self.topology
        chips = math.prod(extent) if extent else len(first)
        cores = max(1, len(first) // max(1, chips * len(domains))) if topology.is_torus else 1
        used: list[tuple[object, ...]] = [
            ("torus", axis, way) for axis, n in enumerate(extent) if n > 1 for way in (1, -1)
        ]
        if len(domains) > 1:
            used.append(("network",))
        if not topology.is_torus:
            used.append(("fabric",))
        return Span(
            size=len(first),
            extent=extent,
            whole=tuple(n == k for n, k in zip(extent, topology.shape, strict=False)),
            crosses_slices=len(domains) > 1,
            inside=max(1, len(first) // max(len(domains), 1)),
            sharing=max(1, topology.chip.devices_per_chip // cores) if topology.is_torus else 1,
            resources=frozenset(used or [("chip",)]),
        )

    def _link(self, span: Span, drives: int | None) -> Link:
        if not self.topology.is_torus:
            return switched_link(span.size, span.inside, self.topology.chip, self.calibration)
        return torus_link(
            size=span.size,
            extent=span.extent,
            whole=span.whole,
            crosses_slices=span.crosses_slices,
            topology=self.topology,
            calibration=self.calibration,
            drives=drives,
            sharing=span.sharing,
        )

    def _permute(self, pairs: Groups, bytes_: float) -> float:
        load = self._load(pairs)
        if not load.most:
            return 0.0
        link = self._link(self.span(load.crossing or pairs), None)
        if load.crossing:
            return bytes_ * load.most / link.point_bytes_per_second + link.seconds
        one = self._one() if self.topology.is_torus else link.bytes_per_second
        return bytes_ * load.most / one + self.calibration.fabric_seconds * load.most

    def _one(self) -> float:
        return (self.topology.chip.link_bytes_per_second or math.inf) * self.calibration.fabric_efficiency

    def _load(self, pairs: Groups) -> _Load:
        if pairs not in self._loads:
            self._loads[pairs] = self._find_load(pairs)
        return self._loads[pairs]

    def _find_load(self, pairs: Groups) -> _Load:
        moving = np.asarray([pair for pair in pairs if pair[0] != pair[1]], int).reshape(-1, 2)
        if not len(moving):
            return _Load(most=0.0)
        source, target = moving[:, 0], moving[:, 1]
        leaving = moving[self._domain[source] != self._domain[target]]
        if len(leaving):
            return _Load(most=1.0, crossing=((int(leaving[0, 0]), int(leaving[0, 1])),))
        if not self.topology.is_torus:
            return _Load(most=1.0)
        loads: dict[tuple[int, ...], int] = {}
        used: set[tuple[object, ...]] = set()
        shape, wrap = self.topology.shape, self.topology.wrap
        starts = np.stack([c[source] for c in self._within], axis=1)
        ends = np.stack([c[target] for c in self._within], axis=1)
        for begin, end, domain in zip(starts.tolist(), ends.tolist(), self._domain[source], strict=True):
            here = list(begin)
            for axis, n in enumerate(shape):
                steps, way = _shortest(begin[axis], end[axis], n, wrap[axis])
                for _ in range(steps):
                    link = (int(domain), *here, axis, way)
                    loads[link] = loads.get(link, 0) + 1
                    used.add(("torus", axis, way))
                    here[axis] = (here[axis] + way) % n
        # Two cores of one chip exchange over no link between chips.
        return _Load(most=float(max(loads.values(), default=1)), resources=frozenset(used))


@functools.lru_cache(maxsize=4096)
def _shortest(begin: int, end: int, size: int, wraps: bool) -> tuple[int, int]:
    forward = end - begin
    if not wraps:
        return abs(forward), 1 if forward > 0 else -1
    ahead, back = forward % size, -forward % size
    return (ahead, 1) if ahead <= back else (back, -1)


_EMITTER = re.compile(r'"collective_algorithm_config":\{"emitter":"(\w+)"(?:,"strategy":"(\w+)")?')
_COLORS = re.compile(r"(?:Strategy\w*|\w+Strategy)\{colors:(\d+)")
_RING = re.compile(r'"ring_type":"(\w+)"')
_BACKEND = re.compile(r'"backend":"(\w+)"')
_KERNEL = re.compile(r'"kernel_strategy":"KERNEL_STRATEGY_(\w+)"')


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Algorithm of a collective.

    Attributes:
      name: as the compiler names it: emitter, strategy, colors; ``ring (assumed)`` where it names none.
      drives: directed links over which a device sends at once; None where the compiler does not say.
    """

    name: str
    drives: int | None = None


ASSUMED = Algorithm(name="ring (assumed)")
POINT_TO_POINT = Algorithm(name="point to point", drives=1)
#: Pieces of a collective between products: libtpu names no algorithm for them, and its kernel is a ring.
FUSED = Algorithm(name="asynchronous collective fusion, ring (assumed)", drives=2)


def algorithm(instruction: Instruction) -> Algorithm:
    """Return the algorithm that an instruction's configuration names, `ASSUMED` if it names none."""
    text = instruction.attributes
    rings = [_RING.search(color) for color in text.split('"phase_rings"')[1:]]
    if rings:
        drives = sum(1 if ring is not None and "UNIDIR" in ring[1] else 2 for ring in rings)
        return Algorithm(name=f"SparseCore offload colors:{len(rings)}", drives=drives)
    named = _EMITTER.search(text)
    if named is None:
        return _gpu(text)
    emitter, strategy = named[1], named[2] or ""
    found = _COLORS.search(text)
    colors = int(found[1]) if found else None
    name = emitter
    if strategy:
        name += f"/{strategy}" + (f" colors:{colors}" if colors is not None else "")
    return Algorithm(name=name, drives=_drives(emitter, strategy, colors))


def _drives(emitter: str, strategy: str, colors: int | None) -> int | None:
    if emitter.startswith("1D") or emitter == "SinglePhaseRingSumEmitter":
        return 2
    if colors is None:
        return None
    return colors if strategy.startswith("UniDirection") else 2 * colors


def _gpu(text: str) -> Algorithm:
    kernel, backend = _KERNEL.search(text), _BACKEND.search(text)
    if kernel is not None and kernel[1] != "DEFAULT":
        return Algorithm(name=kernel[1].lower().replace("_", " "))
    if backend is not None:
        return Algorithm(name="NCCL ring (assumed)" if backend[1] == "DEFAULT" else backend[1])
    return ASSUMED
