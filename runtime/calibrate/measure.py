"""Timing the attached devices and fitting one record to them: `meshwright calibrate`."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator

import jax

from ...sharding.cost.measured import Measurement
from ...sharding.errors import UserError
from ...sharding.files import user_cache
from ...sharding.hardware.topology import Topology
from ...sharding.ops.cudnn import library_version
from . import collectives, kernels
from .fit import fit
from .kernels import Row
from .loops import Clock


def calibrate(seconds: float = 150.0, said: Callable[[Row], None] | None = None) -> Measurement:
    """Time products, attention, elementwise work, the optimizer, collectives and host transfers here.

    Args:
      seconds: for all of it, up to what is just being compiled; what comes last is then left out.
      said: told each row as it is timed.

    Raises:
      UserError: `seconds` is not above 0, or nothing could be timed.
    """
    if not seconds > 0.0:
        raise UserError(f"seconds={seconds:g} must be above 0")
    devices = jax.devices()
    chip = Topology.local().chip
    sizes = kernels.sizes_for(chip.platform)
    implementation = "cudnn" if chip.platform == "gpu" and chip.attention_kernel == "cudnn" else "xla"
    parts: list[Callable[[Clock], Iterator[Row]]] = [
        lambda clock: kernels.products(clock, sizes),
        lambda clock: kernels.elementwise(clock, sizes),
        lambda clock: kernels.optimizer(clock, sizes),
        lambda clock: collectives.collectives(clock, devices),
        lambda clock: kernels.attention(clock, sizes, implementation),
        lambda clock: kernels.host_transfers(clock, sizes),
    ]
    rows: list[Row] = []
    for part, clock in zip(parts, Clock.within(seconds).parts(len(parts)), strict=True):
        for row in part(clock):
            rows.append(row)
            if said is not None:
                said(row)
    if not rows:
        raise UserError(f"{seconds:g} seconds are too few to time anything")
    return Measurement(
        chip=chip.name,
        jax=jax.__version__,
        driver=_driver(),
        cudnn=_cudnn() if chip.platform == "gpu" else "",
        efficiencies=fit(rows, chip),
        measured=tuple(rows),
    )


def proposed(measurement: Measurement) -> pathlib.Path:
    """Return where the cache keeps a measurement: one file a chip, JAX, driver and cuDNN."""
    words = (measurement.chip, f"jax-{measurement.jax}", measurement.driver, measurement.cudnn)
    name = "-".join(word.replace("/", "_").replace(" ", "_") for word in words if word)
    return user_cache() / "calibrations" / f"{name}.json"


def kept(chip: str, version: str) -> pathlib.Path | None:
    """Return the newest measurement that the cache keeps of a chip and a JAX version, None if it has none."""
    name = proposed(Measurement(chip=chip, jax=version)).stem
    folder = user_cache() / "calibrations"
    files = [path for path in folder.glob("*.json") if path.stem == name or path.stem.startswith(f"{name}-")]
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def _driver() -> str:
    version = pathlib.Path("/proc/driver/nvidia/version")
    if jax.devices()[0].platform != "gpu" or not version.exists():
        return ""
    words = version.read_text(encoding="utf-8").split()
    numbers = itertools.dropwhile(lambda word: not word[0].isdigit(), words)
    return f"driver-{next(numbers, '')}"


def _cudnn() -> str:
    return f"cudnn-{library_version()}"


def line(row: Row) -> str:
    """Return a timed row as a line to print."""
    what = " ".join(f"{name}={value}" for name, value in row.items() if name not in ("kind", "seconds"))
    return f"{row['kind']}: {what}: {1e3 * row['seconds']:.3f} ms"
