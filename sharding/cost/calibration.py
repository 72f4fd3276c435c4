"""Efficiencies of chips: what XLA's programs reach of their datasheets' rates, and seconds besides."""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError, nearest
from ..hardware.chip import chips

_SHIPPED = Path(__file__).with_name("calibration.toml")

_Record = TypeVar("_Record", bound="Calibration")


def _also_compiled(default: float) -> float:
    """Return a field that reading a compiled program takes too, not the Estimate alone."""
    return dataclasses.field(default=default, metadata={"compiled": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What datasheets do not say of a chip. The defaults are those of a perfect one.

    Attributes:
      matmul_efficiency: share of the peak that products reach which are large in every role.
      matmul_half_size: size of a role at which a product is half as fast as a large one.
      unaligned_efficiency: share of an aligned product's rate that one reaches with a role which matrix units
        do not read whole (`Execution.aligned_elements`).
      attention_efficiency: share of the peak that a fused attention kernel reaches, with wide heads over many
        keys.
      attention_half_width: width of a head at which such a kernel is half as fast as with a wide one.
      attention_half_keys: keys of a query, those that no mask known beforehand hides, at which it is half as
        fast as with many.
      masked_efficiency: share of that which it reaches where segments are read as a mask of queries by keys.
      float32_efficiency: share of other products' efficiency that products of float32 reach.
      short_sum_seconds: time that adding one number of 16 bits to a table's row takes, where a look-up's
        gradient is summed so.
      memory_efficiency: share of the HBM's rate that elementwise work reaches.
      kept_passes: times that a value which a loop over layers keeps for the backward pass goes through memory
        beyond what its maker writes and its reader reads: the stack of all turns filled with zeros, the value
        copied into it and out again.
      optimizer_efficiency: share of the HBM's rate that the optimizer reaches.
      turn_seconds: what a turn of a loop takes besides, where the host has to be told whether it goes on.
      kernel_seconds: host's time for one kernel; a step is never faster than its kernels are issued.
      microbatch_seconds: host's time for a microbatch.
      step_seconds: host's time for a step.
      fabric_efficiency: share of the fast links' rate that collectives reach.
      fabric_seconds: start of a collective for each device or hop that it visits.
      network_efficiency: share of the network's rate that collectives reach.
      network_seconds: start of a collective for each domain (host, slice) that it visits.
      overlap_parameters: share of the computing beside it that can hide gathering parameters.
      overlap_host: the same of sending values to the host and back.
      overlap_gradients: the same of reducing gradients once a step.
      overlap_shards: the same where each device updates its share alone (ZeRO-1).
      overlap_activations: share of an exchange of activations that is hidden.
      overlap_stages: share of a microbatch's computing that can hide sending to the next stage.
      product_cycles: schedules' cycles of products over those that a TPU's compiler estimates before.
      fusion_efficiency: share of the HBM's rate that a TPU's compiler counts on for elementwise work.
      imbalance_per_doubling: share of a step by which the slowest device is later, each time that devices
        double.
      fragmentation: places that an allocator leaves free between arrays, as a share of what comes and goes
        within a step: they are needed and hold nothing.
      usable_memory: share of a device's memory that a step may be estimated to take.
    """

    matmul_efficiency: float = _also_compiled(1.0)
    matmul_half_size: float = _also_compiled(0.0)
    unaligned_efficiency: float = _also_compiled(1.0)
    attention_efficiency: float = _also_compiled(1.0)
    attention_half_width: float = _also_compiled(0.0)
    attention_half_keys: float = _also_compiled(0.0)
    masked_efficiency: float = _also_compiled(1.0)
    float32_efficiency: float = _also_compiled(1.0)
    short_sum_seconds: float = _also_compiled(0.0)
    memory_efficiency: float = _also_compiled(1.0)
    kept_passes: float = 0.0
    optimizer_efficiency: float = 1.0
    turn_seconds: float = _also_compiled(0.0)
    kernel_seconds: float = 0.0
    microbatch_seconds: float = 0.0
    step_seconds: float = 0.0
    fabric_efficiency: float = _also_compiled(1.0)
    fabric_seconds: float = _also_compiled(0.0)
    network_efficiency: float = _also_compiled(1.0)
    network_seconds: float = _also_compiled(0.0)
    overlap_parameters: float = 0.0
    overlap_host: float = 0.0
    overlap_gradients: float = 0.0
    overlap_shards: float = 0.0
    overlap_activations: float = 0.0
    overlap_stages: float = 0.0
    product_cycles: float = _also_compiled(1.0)
    fusion_efficiency: float = _also_compiled(0.8)
    imbalance_per_doubling: float = 0.0
    fragmentation: float = 0.0
    usable_memory: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if name.endswith("_efficiency") and not value > 0:
                raise UserError(f"{name}={value} must be above 0")
            if value < 0:
                raise UserError(f"{name}={value} must not be below 0")

    def lateness(self, devices: int) -> float:
        """Return how many times as long a step of so many devices takes, since it waits for the slowest.

        Of n devices that is later than the mean by about as much again each time n doubles.
        """
        return 1.0 + self.imbalance_per_doubling * math.log2(max(devices, 1))


def compiled_part(record: Calibration) -> dict[str, float]:
    """Return the fields of `record` that reading a compiled program takes.

    >>> sorted(compiled_part(Calibration()))[:2]
    ['attention_efficiency', 'attention_half_keys']
    """
    fields = dataclasses.fields(record)
    return {field.name: getattr(record, field.name) for field in fields if field.metadata.get("compiled")}


def checked(kind: type[_Record], row: Mapping[str, Any]) -> _Record:
    """Return the record of plain values. Raises UserError for a key that is none of its fields."""
    known = [field.name for field in dataclasses.fields(kind)]
    for key in row:
        if key not in known:
            raise UserError(f"a calibration has no {key!r}; {nearest(key, known)}")
    return kind(**row)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a calibration file. Raises UserError where there is none, or it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no calibration file {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def read(path: Path) -> dict[tuple[str, str | None], Calibration]:
    """Return (chip, kernel of attention or None) → record from a file such as `calibration.toml`.

    A chip's table starts from ``[default]``, or from that of the chip that it is `transferred` from, kernels
    and all; a kernel's (``[CHIP.kernels.NAME]``) from its chip's.
    """
    tables = read_toml(path)
    base = _efficiencies(tables.pop("default"))
    found: dict[tuple[str, str | None], Calibration] = {("default", None): checked(Calibration, base)}
    for chip, row in tables.items():
        kin = tables.get(row.get("transferred", ""), {})
        own = base | _efficiencies(kin) | _efficiencies(row)
        found[chip, None] = checked(Calibration, own)
        for kernel in {**kin.get("kernels", {}), **row.get("kernels", {})}:
            changed = [table.get("kernels", {}).get(kernel, {}) for table in (kin, row)]
            whole = own | _efficiencies(changed[0]) | _efficiencies(changed[1])
            found[chip, kernel] = checked(Calibration, whole)
    return found


def _efficiencies(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in ("source", "transferred", "kernels")}


def transferred_from(chip: str) -> str | None:
    """Return the chip whose shipped efficiencies `chip` has, as shares of its own datasheet's rates, or None.

    >>> transferred_from("h100"), transferred_from("h200")
    ('h200', None)
    """
    tables = _tables()
    if chip not in tables:
        return _relative(chip)
    found: str | None = tables[chip].get("transferred")
    return found


@functools.cache
def _tables() -> Mapping[str, Any]:
    return read_toml(_SHIPPED)


def _relative(chip: str) -> str | None:
    """Return the chip whose efficiencies one has that has none: as it says itself, for a GPU the H200."""
    own = chips().get(chip)
    return None if own is None or own.platform != "gpu" else own.like or "h200"


@functools.cache
def _shipped() -> Mapping[tuple[str, str | None], Calibration]:
    return read(_SHIPPED)


def calibration_for(chip: str, kernel: str | None = None) -> Calibration:
    """Return the shipped efficiencies of `chip`, those of attention by `kernel` where they are known.

    A chip that the file has no table of has those of a relative: a GPU those of the chip that it says it is
    like (`Chip.like`), or the H200's; any other the default's.

    >>> calibration_for("v5p").attention_efficiency, calibration_for("v5p", "splash").attention_efficiency
    (0.4, 0.3203)
    """
    known = _shipped()
    name = chip if (chip, None) in known else _relative(chip) or "default"
    return known.get((name, kernel)) or known.get((name, None)) or known["default", None]
