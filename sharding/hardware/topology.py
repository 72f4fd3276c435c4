"""Topologies: devices and their wiring, attached, simulated or described by a text such as ``v5p:4x4x8``."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from .attached import wiring_of
from .chip import Chip, chip_named, chips


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices and their wiring.

    A torus (TPU) has `shape` in chips along each axis of one slice, and `num_slices` slices joined by the
    data-centre network. Anything else has `shape` = (hosts, JAX devices of a host).

    >>> topology = Topology.parse("2*v5e:16x16")
    >>> topology.num_devices, topology.wrap, str(topology)
    (512, (True, True), '2*v5e:16x16')
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1
    hosts_per_slice: int | None = None
    """Hosts of one slice where attached devices show another number than the chip's slices have."""

    def __post_init__(self) -> None:
        dims = self.chip.torus_dims or 2
        if len(self.shape) != dims or min(self.shape, default=0) < 1 or self.num_slices < 1:
            raise UserError(
                f"{self.chip.name} takes {dims} sizes of at least 1 and at least one slice, "
                f"not shape {self.shape} with {self.num_slices} slices"
            )

    @staticmethod
    def parse(text: str | Topology) -> Topology:
        """Read ``[slices*]chip:AxB[xC]``: chips along each torus axis, or hosts x devices of a host.

        One size alone, as in ``cpu:8`` or ``h100:8``, is the devices of a single host. A Topology is returned
        as it is.

        >>> Topology.parse("h100:16x8").num_hosts
        16

        Raises:
          UserError: the text is malformed, the chip unknown, or there is no such slice; names the nearest.
        """
        return text if isinstance(text, Topology) else read(text)

    @staticmethod
    def local() -> Topology:
        """Return the topology of JAX's attached devices, simulated ones and other processes' included.

        Raises:
          UserError: the devices do not form a whole (hosts of unequal size, a slice with holes).
        """
        import jax

        return Topology.of(jax.devices())

    @staticmethod
    def of(devices: Sequence[Any]) -> Topology:
        """Return the topology that `devices` form: attached ones, or those the compiler describes.

        Raises:
          UserError: they are of several kinds or do not form a whole.
        """
        seen = wiring_of(devices)
        usual = Topology(chip=seen.chip, shape=seen.shape, num_slices=seen.num_slices)
        if usual.num_hosts == seen.num_hosts:
            return usual
        return replace(usual, hosts_per_slice=max(1, seen.num_hosts // seen.num_slices))

    def __repr__(self) -> str:
        hosts = "" if self.hosts_per_slice is None else f" of {self.hosts_per_slice} hosts a slice"
        return f"<Topology {self}{hosts}>"

    def __str__(self) -> str:
        shape = self.shape[1:] if not self.is_torus and self.shape[0] == 1 else self.shape
        slices = f"{self.num_slices}*" if self.num_slices > 1 else ""
        return f"{slices}{self.chip.name}:{'x'.join(map(str, shape))}"

    @property
    def is_torus(self) -> bool:
        """Whether the chips are wired as a grid with neighbours (TPU) rather than through a switch."""
        return self.chip.fabric == "torus"

    @property
    def num_devices(self) -> int:
        """JAX devices, over all slices."""
        per_chip = self.chip.devices_per_chip if self.is_torus else 1
        return self.num_slices * math.prod(self.shape) * per_chip

    @property
    def num_chips(self) -> int:
        """Chips, over all slices."""
        return self.num_devices // self.chip.devices_per_chip

    @property
    def devices_per_slice(self) -> int:
        """JAX devices of one slice."""
        return self.num_devices // self.num_slices

    @property
    def num_hosts(self) -> int:
        """Hosts (on TPU: virtual machines, one JAX process each), over all slices."""
        return self.num_slices * math.prod(self.shape) // math.prod(self.host_shape)

    @property
    def devices_per_host(self) -> int:
        """JAX devices of one host."""
        return self.num_devices // self.num_hosts

    @property
    def host_shape(self) -> tuple[int, ...]:
        """The block of `shape` that one host holds: chips along each torus axis, or (1, devices)."""
        if not self.is_torus:
            return (1, self.shape[1])
        if self.hosts_per_slice is not None:
            return _block(self.shape, math.prod(self.shape) // self.hosts_per_slice, self.chip.host_bounds)
        if tuple(sorted(self.shape)) in self.chip.single_host_slices:
            return self.shape
        return tuple(math.gcd(n, bound) for n, bound in zip(self.shape, self.chip.host_bounds, strict=True))

    @property
    def wrap(self) -> tuple[bool, ...]:
        """For each torus axis, whether a link joins its ends; empty where there is no torus."""
        if not self.is_torus:
            return ()
        if self.chip.wrap_axis_of is not None:
            return tuple(n == self.chip.wrap_axis_of for n in self.shape)
        multiple = self.chip.wrap_if_all_multiples_of
        closed = multiple is not None and all(n % multiple == 0 for n in self.shape)
        return (closed,) * len(self.shape)

    @functools.cached_property
    def devices_per_domain(self) -> int:
        """JAX devices that reach each other over the fast fabric: a slice, an NVLink domain, or a host."""
        if self.is_torus:
            return self.devices_per_slice
        if self.chip.domain_chips is None or self.chip.chips_per_host is None:
            return self.devices_per_host
        hosts = max(1, self.chip.domain_chips // self.chip.chips_per_host)
        return self.devices_per_host * min(hosts, self.num_hosts)

    @property
    def num_domains(self) -> int:
        """Fast-fabric domains; the last may be partly filled."""
        return math.ceil(self.num_devices / self.devices_per_domain)

    def is_met_by(self, attached: Topology) -> bool:
        """Whether `attached` has this topology; simulated devices may belong to any number of processes."""
        if self.chip.platform == "cpu" and self.num_hosts == 1:
            return attached.chip.platform == "cpu" and attached.num_devices == self.num_devices
        return str(attached) == str(self)

    def devices(self) -> list[Any]:
        """Return the real devices of this topology, attached or simulated.

        A topology that is part of one host takes the first of its devices.

        Raises:
          UserError: other devices are attached; says which.
        """
        import jax

        attached = jax.devices()
        local = Topology.of(attached)
        same = local.chip.name == self.chip.name
        if self.is_met_by(local):
            return attached
        part_of_host = self.num_hosts == 1 and local.num_hosts == 1 and self.num_devices < len(attached)
        if same and not self.is_torus and part_of_host:
            return attached[: self.num_devices]
        hint = ""
        if self.chip.platform == "cpu" and local.chip.platform == "cpu" and self.num_hosts == 1:
            hint = f"; set JAX_NUM_CPU_DEVICES={self.num_devices} before JAX starts to simulate them"
        raise UserError(
            f"{self} is {self.num_devices} {self.chip.name} devices on {self.num_hosts} "
            f"host{'s' * (self.num_hosts > 1)}, but {local} is attached{hint}"
        )

    def compiler_arguments(self) -> dict[str, Any]:
        """Return what `jax.experimental.topologies.get_topology_desc` takes to describe these TPU slices.

        Raises:
          UserError: the topology is not a TPU's.
        """
        if not self.is_torus:
            raise UserError(f"{self} has no TPU compiler; a TPU topology looks like v5p:4x4x8")
        arguments: dict[str, Any] = {
            "topology_name": f"{self.chip.compiler_name}:{'x'.join(map(str, self.shape))}",
            "platform": "tpu",
            "wrap": self.wrap + (False,) * (3 - len(self.wrap)),
            "chips_per_host_bounds": self.host_shape + (1,) * (3 - len(self.shape)),
        }
        if self.num_slices > 1:
            arguments["num_slices"] = self.num_slices
        if self.chip.compiler_chip_config is not None:
            arguments["chip_config_name"] = self.chip.compiler_chip_config
        return arguments


def _block(shape: tuple[int, ...], size: int, preferred: tuple[int, ...]) -> tuple[int, ...]:
    """Return a block of `size` that tiles `shape`: the preferred block, grown along the first axes it can."""
    block, left = [], size
    for n, bound in zip(shape, preferred, strict=True):
        block.append(math.gcd(math.gcd(n, bound), left))
        left //= block[-1]
    for axis, n in enumerate(shape):
        grow = math.gcd(n // block[axis], left)
        block[axis] *= grow
        left //= grow
    if left != 1:
        raise UserError(f"hosts of {size} chips do not tile a slice of {'x'.join(map(str, shape))}")
    return tuple(block)


_EXAMPLES = "cpu:8, v5p:4x4x8, 2*v5e:16x16, h100:16x8 (hosts x devices of a host)"
_WRITTEN = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<chip>[a-z][a-z0-9-]*):(?P<shape>\d+(?:x\d+)*)")
_CLOUD_NAME = re.compile(r"(?P<chip>[a-z][a-z0-9]*)-(?P<count>\d+)")


def read(text: str) -> Topology:
    """Return the topology that `text` describes, as `Topology.parse` does."""
    cleaned = "".join(str(text).split()).casefold()
    match = _WRITTEN.fullmatch(cleaned)
    if match is None:
        raise UserError(_malformed(str(text), cleaned))
    chip = chip_named(match["chip"])
    shape = tuple(int(n) for n in match["shape"].split("x"))
    num_slices = int(match["slices"] or 1)
    if 0 in shape or num_slices == 0:
        raise UserError(f"{text!r} has a size of 0; sizes start at 1, as in {_example(chip)}")
    if chip.torus_dims:
        _check_slice(chip, shape, text)
    else:
        shape = _hosts_and_devices(chip, shape, num_slices, text)
    return Topology(chip=chip, shape=shape, num_slices=num_slices)


def _written(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _example(chip: Chip) -> str:
    if chip.torus_dims:
        return f"{chip.name}:{_written(chip.small_slices[-1])}"
    return f"{chip.name}:8" if chip.platform == "cpu" else f"{chip.name}:4x{chip.chips_per_host or 8}"


def _malformed(text: str, cleaned: str) -> str:
    known = {alias: chip for chip in chips().values() for alias in (chip.name, *chip.aliases)}
    cloud = _CLOUD_NAME.fullmatch(cleaned)
    if cloud is not None and (chip := known.get(cloud["chip"])) is not None and chip.torus_dims:
        counted = "cores" if chip.counted_in_cores else "chips"
        count = int(cloud["count"]) // (2 if counted == "cores" else 1)
        instead = f"{chip.name}:{_written(_slice_of(chip, count))}"
        return f"{text!r} counts {counted} and hides the shape; write the shape in chips, as in {instead}"
    if cleaned in known:
        return f"{text!r} names a chip but no shape; write for example {_example(known[cleaned])}"
    return f"{text!r} is not a topology; write [slices*]chip:shape, for example {_EXAMPLES}"


def _hosts_and_devices(chip: Chip, shape: tuple[int, ...], num_slices: int, text: str) -> tuple[int, int]:
    form = f"{chip.name} takes hosts x devices of a host, as in {_example(chip)}"
    if num_slices > 1:
        raise UserError(f"{text!r}: only TPU topologies have slices; {form}")
    if len(shape) > 2:
        raise UserError(f"{text!r} has {len(shape)} sizes, but {form}")
    hosts, per_host = (1, *shape)[-2:]
    limit = chip.chips_per_host
    if limit is not None and per_host > limit:
        total = hosts * per_host
        raise UserError(
            f"{text!r} puts {per_host} devices on a host, but {chip.name} has at most {limit}; "
            f"{total} devices are {chip.name}:{math.ceil(total / limit)}x{limit}"
        )
    return hosts, per_host


def _check_slice(chip: Chip, shape: tuple[int, ...], text: str) -> None:
    dims = chip.torus_dims
    if len(shape) != dims:
        padded = (shape + (1,) * dims)[: max(dims, 1)]
        raise UserError(
            f"{text!r} has {len(shape)} dimensions, but a {chip.name} slice has {dims} "
            f"({'x'.join('ABC'[:dims])}), as in {chip.name}:{_written(_nearest_slice(chip, padded))}"
        )
    nearest = f"nearest: {chip.name}:{_written(_nearest_slice(chip, shape))}"
    slices = f"a {chip.name} slice"
    if chip.max_axis is not None and max(shape) > chip.max_axis:
        raise UserError(
            f"{text!r}: an axis of {slices} is at most {chip.max_axis}, not {max(shape)}; {nearest}"
        )
    count = math.prod(shape)
    if chip.max_slice_chips is not None and count > chip.max_slice_chips:
        raise UserError(f"{text!r} is {count} chips; {slices} has at most {chip.max_slice_chips}; {nearest}")
    if not _is_slice(chip, shape):
        there_are = ", ".join(map(_written, chip.small_slices))
        rule = f", or multiples of {chip.cube} on every axis" if chip.cube else ""
        raise UserError(f"{text!r} is no {chip.name} slice; {nearest} (there are {there_are}{rule})")


def _is_slice(chip: Chip, shape: tuple[int, ...]) -> bool:
    if chip.cube is not None and all(n % chip.cube == 0 for n in shape):
        return True
    return sorted(shape) in [sorted(small) for small in chip.small_slices]


def _nearest_slice(chip: Chip, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the legal slice whose sorted sizes are nearest to those of `shape`, by ratio."""
    wanted = sorted(shape)
    candidates = list(chip.small_slices)
    if chip.cube is not None:
        cubes = [max(chip.cube, round(n / chip.cube) * chip.cube) for n in wanted]
        while chip.max_slice_chips is not None and math.prod(cubes) > chip.max_slice_chips:
            # By a hundredth of the axis at a time: the time must not grow with the size that was written.
            longest = cubes.index(max(cubes))
            cubes[longest] -= max(chip.cube, cubes[longest] // 100 // chip.cube * chip.cube)
        candidates.append(tuple(sorted(cubes)))

    def distance(candidate: tuple[int, ...]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(sorted(candidate), wanted, strict=True))

    return min(candidates, key=distance)


def _slice_of(chip: Chip, count: int) -> tuple[int, ...]:
    """Return the most nearly cubic legal slice of about `count` chips."""
    cube = chip.cube
    if cube is None or count < cube**chip.torus_dims:
        return min(chip.small_slices, key=lambda small: abs(math.log(math.prod(small) / max(count, 1))))
    cubes = min(count, chip.max_slice_chips or count) // cube**3
    splits = (
        (a, b, cubes // a // b)
        for a in range(1, cubes + 1)
        if cubes % a == 0
        for b in range(a, cubes // a + 1)
        if cubes // a % b == 0 and cubes // a // b >= b
    )
    return tuple(n * cube for n in min(splits, key=lambda split: split[2] / split[0]))
