"""Devices that JAX has attached: their kind, their order, and the plugins of accelerators that are absent.

JAX starts every plugin that is installed, in every process. On a machine that only compiles, the CUDA plugin
finds no cuDNN and logs a traceback, and libtpu warns that it does not know which host of a slice it runs on.
Neither matters without a device.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError, wrong
from .chip import Chip, chip_of_device_kind

_ROOT = pathlib.Path("/")

# What the operating system shows of an accelerator, by kind. /dev/dxg is a GPU under WSL, nvhost and nvmap
# are Tegra's; newer TPUs are handed through as numbered VFIO groups, as other PCI devices may be.
_TEGRA = ("dev/nvhost-*", "dev/nvmap")
_NVIDIA = ("proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*", "dev/nvidiactl", "dev/dxg", *_TEGRA)
_SIGNS = {"gpu": _NVIDIA, "tpu": ("dev/accel*", "dev/vfio/[0-9]*"), "rocm": ("dev/kfd",)}

# Variables that quiet the plugin of a device that a process does not use, by kind; they are read when JAX
# first looks for devices. The CUDA plugin then does not check its libraries. libtpu does not query a metadata
# server, writes no log file, and lets several processes load it; by default it takes each for the one that
# drives the chips.
QUIETING = {
    "gpu": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
    "tpu": {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
}


def attached_accelerators() -> tuple[str, ...]:
    """Return the kinds of accelerators (``gpu``, ``tpu``, ``rocm``) that the operating system shows."""
    return tuple(kind for kind, signs in _SIGNS.items() if any(any(_ROOT.glob(sign)) for sign in signs))


def attached_nvidia() -> tuple[str, ...]:
    """Return the kinds of NVIDIA GPUs that their driver lists, as JAX calls them; it may list none."""
    models = []
    for path in sorted(_ROOT.glob("proc/driver/nvidia/gpus/*/information")):
        match = re.search(r"^Model:\s*(.+?)\s*$", path.read_text(errors="replace"), re.MULTILINE)
        models += [match[1]] if match else []
    return tuple(dict.fromkeys(models))


def quiet_absent() -> None:
    """Set the variables that quiet the plugins of absent accelerators, in a process that simulates devices.

    Nothing is set for an accelerator that is attached: there the plugin's messages are of use. To be called
    before JAX looks for devices.
    """
    attached = attached_accelerators()
    quiet(*(kind for kind in QUIETING if kind not in attached))


@contextlib.contextmanager
def quieted() -> Iterator[None]:
    """Quiet the plugins of absent accelerators while JAX may look for devices, and set nothing for good."""
    before = dict(os.environ)
    quiet_absent()
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


def quiet(*kinds: str) -> None:
    """Set the variables that quiet the plugins of `kinds` (``gpu``, ``tpu``); those that are set stay."""
    for kind in kinds:
        for name, value in QUIETING[kind].items():
            os.environ.setdefault(name, value)


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What devices say of themselves: their chip, the shape they form and the hosts they are on.

    `shape` is chips along each torus axis of one slice, or (hosts, devices of a host); `num_hosts` counts
    the hosts of all slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int
    num_hosts: int


def wiring_of(devices: Sequence[Any]) -> Wiring:
    """Return how `devices`, JAX's or those that a compiler describes, are wired.

    Raises:
      UserError: there are none, they are of several kinds, or they do not fill a whole shape.
    """
    if not isinstance(devices, Sequence) or not all(hasattr(one, "device_kind") for one in devices):
        raise wrong("devices", devices, "is no list of JAX's devices, such as jax.devices()")
    if not devices:
        raise UserError("there are no devices to form a topology; attach one, or set JAX_NUM_CPU_DEVICES")
    kinds = sorted({device.device_kind for device in devices})
    if len(kinds) > 1:
        raise UserError(
            f"devices of several kinds ({', '.join(kinds)}) do not form one topology; choose one kind"
        )
    chip = chip_of_device_kind(kinds[0], devices[0].platform)
    if chip.torus_dims:
        return _torus(chip, devices)
    per_host = Counter(_host_of(device, chip) for device in devices)
    if len(set(per_host.values())) > 1:
        sizes = ", ".join(str(count) for _, count in sorted(per_host.items()))
        raise UserError(
            f"hosts with unequal numbers of {chip.name} devices ({sizes}) do not form one topology; "
            f"use {min(per_host.values())} on each"
        )
    hosts = len(per_host)
    return Wiring(chip=chip, shape=(hosts, next(iter(per_host.values()))), num_slices=1, num_hosts=hosts)


def by_position(devices: Sequence[Any], chip: Chip) -> np.ndarray:
    """Return `devices`, all of kind `chip`, ordered by a topology's positions: an object array [devices].

    Positions count through slices, then torus coordinates (the last axis fastest), then a chip's cores; or
    through hosts (those of one fast domain together), then a host's devices.
    """
    if not chip.torus_dims:
        ordered = sorted(
            devices, key=lambda device: (*_host_of(device, chip), device.process_index, device.id)
        )
    else:
        ordered = sorted(
            devices,
            key=lambda device: (_slice_of(device), *device.coords, getattr(device, "core_on_chip", 0)),
        )
    result = np.empty(len(ordered), dtype=object)
    result[:] = ordered
    return result


def _host_of(device: Any, chip: Chip) -> tuple[int, int]:
    """Return a key of a device's host, ordered so that hosts of one fast domain are neighbours.

    Several processes may share a host of GPUs (one each, under Slurm or MPI); XLA then gives their devices
    the `slice_index` of the machine, or of the NVLink rack, whose hosts the process index tells apart.
    Described devices all have `slice_index` 0, and (domain, host, device) for coordinates.
    """
    coords = getattr(device, "coords", None)
    if chip.platform == "gpu" and coords is not None and len(coords) == 3:
        return (coords[0], coords[1])
    machine = getattr(device, "slice_index", None)
    if chip.platform != "gpu" or machine is None:
        return (0, device.process_index)
    return (machine, 0 if chip.domain_chips == chip.chips_per_host else device.process_index)


def _slice_of(device: Any) -> int:
    # Devices of a single slice may not say which it is.
    return getattr(device, "slice_index", None) or 0


def _torus(chip: Chip, devices: Sequence[Any]) -> Wiring:
    slices: dict[int, list[Any]] = defaultdict(list)
    for device in devices:
        slices[_slice_of(device)].append(device)
    shapes = {_extent(chip, members) for members in slices.values()}
    if len(shapes) > 1:
        shown = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise UserError(f"{chip.name} slices of shapes {shown} do not form one topology; use equal ones")
    hosts = len({(_slice_of(device), device.process_index) for device in devices})
    return Wiring(chip=chip, shape=shapes.pop(), num_slices=len(slices), num_hosts=hosts)


def _extent(chip: Chip, members: Sequence[Any]) -> tuple[int, ...]:
    coords = [tuple(device.coords) for device in members]
    extent = tuple(max(axis) - min(axis) + 1 for axis in zip(*coords, strict=True))
    shape = extent[: chip.torus_dims]
    places = len(set(coords))
    if places != math.prod(extent) or places != math.prod(shape):
        box = "x".join(map(str, extent))
        raise UserError(
            f"{places} {chip.name} chips do not fill the {box} box they span; choose chips that do"
        )
    if len(members) != places * chip.devices_per_chip:
        config = chip.compiler_chip_config
        hint = f"; describe them with chip_config_name={config!r}" if config else ""
        each = f"{places} {chip.name} chips, which have {chip.devices_per_chip} each"
        raise UserError(f"{len(members)} devices on {each}{hint}")
    return shape
