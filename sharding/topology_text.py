"""Reading a topology that someone wrote, and saying what is wrong with it."""

from __future__ import annotations

import math
import re

from .chips import Chip, chip_named, chips
from .errors import UserError
from .topology import Topology

_EXAMPLES = "cpu:8, v5p:4x4x8, 2*v5e:16x16, h100:16x8 (hosts x devices of a host)"
_WRITTEN = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<chip>[a-z][a-z0-9-]*):(?P<shape>\d+(?:x\d+)*)")
_CLOUD_NAME = re.compile(r"(?P<chip>[a-z][a-z0-9]*)-(?P<count>\d+)")
# Google's own names count TensorCores on these chips and chips on the others.
_COUNTED_IN_CORES = ("v4", "v5p", "tpu7x")


def read(text: str) -> Topology:
    """Return the topology that `text` describes; see `Topology.parse`."""
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
        counted = "cores" if chip.name in _COUNTED_IN_CORES else "chips"
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
            # A hundredth of an axis at a time, so that an absurd size costs no absurd time.
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
