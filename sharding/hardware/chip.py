"""Chips: peak rates, memory, links and the slices they come in, from `chips.toml` and a file of the user's.

A user's file, which the variable `MESHWRIGHT_CHIPS` names, has tables of the same keys for chips that are not
shipped; it is read on every host that plans or trains.
"""

from __future__ import annotations

import functools
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import UserError, nearest

_FACTS = Path(__file__).with_name("chips.toml")

#: Names a file of chips that are not shipped.
OWN = "MESHWRIGHT_CHIPS"
_PAGE = "docs/howto/plan.md"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator: rates, memory, links and the slices it comes in.

    Figures are those of one JAX device unless the name says ``per_chip`` or ``link``; rates are dense and
    one way. None means not known. `chips.toml` says where each comes from.
    """

    name: str
    vendor: str
    platform: str
    device_kinds: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    devices_per_chip: int = 1
    counted_in_cores: bool = False
    """Whether the vendor's names of slices, such as ``v4-8``, count TensorCores rather than chips."""
    nominal: bool = False
    """True where the figures describe no real chip, so that utilisation means nothing."""

    peak_bf16_flops: float | None = None
    peak_fp8_flops: float | None = None
    peak_int8_flops: float | None = None
    peak_f32_flops: float | None = None
    """An f32 matmul at JAX's default precision: one bf16 pass on TPU, TF32 on GPU."""
    vector_f32_flops: float | None = None
    measured_matmul_bf16_flops: float | None = None
    measured_matmul_fp8_flops: float | None = None
    hbm_bytes: int | None = None
    memory_share: float = 1.0
    """Share of hbm_bytes that JAX lets programs have by default."""
    hbm_bytes_per_second: float | None = None
    vmem_bytes: int | None = None
    kernel_vmem_bytes: int | None = None
    """Part of vmem_bytes that one kernel gets unless a compiler option says otherwise."""
    attention_kernel: str | None = None
    """What carries out attention on it, of `ops/kernels.toml`; None leaves it to XLA."""
    lanes: int = 1
    """Elements in a row of the tiles that arrays are stored in; a shorter last axis is padded to them."""
    clock_hz: float | None = None
    """Clock of one core, in whose cycles the compiler counts; the two cores of a megacore work at once."""

    fabric: str = "host"
    """``torus``, ``switch``, ``full_mesh``, ``shared_memory``, or ``host`` when not known."""
    link_bytes_per_second: float | None = None
    links_per_chip: int | None = None
    core_link_bytes_per_second: float | None = None
    """One way, between the devices of one chip, where a chip has several."""
    domain_chips: int | None = None
    """Chips that reach each other over the fast fabric; None on a torus, where it is the slice."""
    chips_per_host: int | None = None
    switch_sums: float | None = None
    """Share of what collectives reach on the fast links at which the switch sums; None where it cannot."""
    dcn_bytes_per_second_per_chip: float | None = None
    host_link_bytes_per_second_per_chip: float | None = None

    torus_dims: int = 0
    small_slices: tuple[tuple[int, ...], ...] = ()
    cube: int | None = None
    wrap_if_all_multiples_of: int | None = None
    wrap_axis_of: int | None = None
    max_axis: int | None = None
    max_slice_chips: int | None = None
    max_job_chips: int | None = None
    host_bounds: tuple[int, ...] = ()
    single_host_slices: tuple[tuple[int, ...], ...] = ()

    compiler_name: str | None = None
    compiler_chip_config: str | None = None
    usd_per_chip_hour: float | None = None
    like: str | None = None
    """Shipped chip whose efficiencies it has, as shares of its own rates, where none are shipped of it."""
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.platform not in ("tpu", "gpu", "cpu"):
            raise ValueError(f"{self.name}: platform {self.platform!r} is none of tpu, gpu, cpu")
        if bool(self.torus_dims) != (self.fabric == "torus"):
            raise ValueError(f"{self.name}: fabric {self.fabric!r} with torus_dims={self.torus_dims}")

    @property
    def usable_bytes(self) -> float:
        """Bytes of a device's memory that a program may have; infinite where that is not known."""
        return math.inf if self.hbm_bytes is None else self.hbm_bytes * self.memory_share

    @property
    def fabric_bytes_per_second_per_chip(self) -> float | None:
        """Bytes a second, one way, over all of a chip's fast links together; None where not known."""
        if self.link_bytes_per_second is None or self.links_per_chip is None:
            return None
        return self.link_bytes_per_second * self.links_per_chip

    def peak_flops(self, dtype: str) -> float | None:
        """Return the peak flops a second of one JAX device's matrix products on operands of `dtype`.

        `dtype` is the name of a NumPy or JAX dtype. None where the chip has no figure for it.

        >>> chip_named("v5p").peak_flops("bfloat16")
        459000000000000.0

        Raises:
          KeyError: no chip has figures for such a dtype.
        """
        return getattr(self, self.peak_key(dtype))

    def peak_key(self, dtype: str) -> str:
        """Return the name of the figure that `peak_flops` returns."""
        return f"peak_{_PEAK_COLUMN[str(dtype)]}_flops"


_PEAK_COLUMN = {
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "bf16",
    "f16": "bf16",
    "float32": "f32",
    "f32": "f32",
    "int8": "int8",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "fp8": "fp8",
}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def chips() -> Mapping[str, Chip]:
    """Return every chip of `chips.toml`, and of the file that `MESHWRIGHT_CHIPS` names, by name.

    Raises:
      UserError: that file is not there, or is no file of chips.
    """
    own = os.environ.get(OWN)
    return MappingProxyType({**_shipped(), **_of_file(own)}) if own else _shipped()


@functools.cache
def _shipped() -> Mapping[str, Chip]:
    with _FACTS.open("rb") as file:
        facts = tomllib.load(file)
    found = {}
    for name, row in facts["chips"].items():
        if unknown := set(row) - _KEYS:
            raise ValueError(f"{_FACTS.name}: {name} has unknown keys {sorted(unknown)}")
        if missing := set(row["sources"]) - set(facts["sources"]):
            raise ValueError(f"{_FACTS.name}: {name} names sources {sorted(missing)} that are not listed")
        found[name] = Chip(name=name, **{key: _frozen(value) for key, value in row.items()})
    return MappingProxyType(found)


@functools.cache
def _of_file(path: str) -> Mapping[str, Chip]:
    """Return the chips of a user's file."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("chips")
    except OSError:
        raise UserError(f"{OWN}={path}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{OWN}={path}: {error}") from None
    if not isinstance(tables, dict) or not all(isinstance(row, dict) for row in tables.values()):
        raise UserError(f"{OWN}={path}: it has no tables [chips.NAME]; see {_PAGE}")
    return {name: _own(name, row, f"{OWN}={path}: {name}") for name, row in tables.items()}


def _own(name: str, row: Mapping[str, Any], where: str) -> Chip:
    if name in _shipped():
        raise UserError(f"{where} is shipped; give the chip another name")
    for key, value in row.items():
        if key not in _KEYS:
            raise UserError(f"{where} has {key!r}; {nearest(key, _KEYS)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key.endswith(_NUMBERS) and not (number and value > 0):
            raise UserError(f"{where} has {key}={value!r}, which must be a number above 0")
    kinds = row.get("device_kinds")
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f'{where} says no device_kinds, such as ["NVIDIA L40S"], as jax.devices() names them')
    if row.get("platform") != "gpu":
        raise UserError(f"{where} has platform={row.get('platform')!r}; one of your own is of 'gpu'")
    if (like := row.get("like")) is not None and like not in _shipped():
        raise UserError(f"{where} is like {like!r}; {nearest(like, _shipped())}")
    facts = {"vendor": "unknown", "memory_share": 0.75, "chips_per_host": 1, **row}
    facts.setdefault("domain_chips", facts["chips_per_host"])
    try:
        return Chip(name=name, **{key: _frozen(value) for key, value in facts.items()})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


_KEYS = {field.name for field in fields(Chip)} - {"name"}
_NUMBERS = ("_flops", "_bytes", "_bytes_per_second", "_per_chip", "_per_host", "_chips", "_share")


def chip_named(name: str) -> Chip:
    """Return the chip called `name`, or of which `name` is an alias.

    >>> chip_named("h100").domain_chips
    8

    Raises:
      UserError: there is no such chip; names the nearest.
    """
    known = chips()
    if name in known:
        return known[name]
    for chip in known.values():
        if name in chip.aliases:
            return chip
    raise unknown_chip(name, known)


def unknown_chip(name: str, known: Iterable[str]) -> UserError:
    """Return the error of a name that no chip has."""
    own = f"chips of your own stand in a file that {OWN} names ({_PAGE})"
    return UserError(f"{name!r} is not a chip known here; {nearest(name, known)}; {own}")


def unknown_figure(chip: Chip, what: str, key: str) -> UserError:
    """Return the error of a figure that planning needs and no file has; the user may give it by `key`."""
    if chip.name in _shipped():
        return UserError(f"{chip.name} has no figure for {what}, so it cannot be planned for")
    kinds = ", ".join(f'"{kind}"' for kind in chip.device_kinds)
    table = f'[chips.{chip.name}] with platform = "{chip.platform}" and device_kinds = [{kinds}]'
    return UserError(
        f"{chip.name} has no figure for {what}; give {key} in a file of your own that {OWN} names, in a "
        f"table {table} ({_PAGE})"
    )


def chip_of_device_kind(device_kind: str, platform: str) -> Chip:
    """Return the chip whose devices JAX calls `device_kind`.

    A kind that no file lists gets a chip without figures, named after the kind: one can train on it, and not
    plan for it.
    """
    for chip in chips().values():
        if device_kind.casefold() in (kind.casefold() for kind in chip.device_kinds):
            return chip
    name = re.sub(r"[^a-z0-9]+", "-", device_kind.casefold()).strip("-") or "unknown"
    known_platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    return Chip(name=name, vendor="unknown", platform=known_platform, device_kinds=(device_kind,))
