"""Descriptions of GPUs for XLA's compiler, as protobuf text made from the facts of `gpu_targets.toml`."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..hardware.chip import Chip, chips

_FACTS = Path(__file__).with_name("gpu_targets.toml")


@functools.cache
def _facts() -> Mapping[str, Any]:
    with _FACTS.open("rb") as file:
        facts = tomllib.load(file)
    for name, row in facts["chips"].items():
        if unlisted := set(row["sources"]) - set(facts["sources"]):
            raise ValueError(f"{_FACTS.name}: {name} names sources {sorted(unlisted)} that are not listed")
        if name not in chips() or row["compute_capability"] not in facts["capability"]:
            raise ValueError(
                f"{_FACTS.name}: {name} is no known chip, or its compute capability has no table"
            )
    return facts


def gpu_target_names() -> tuple[str, ...]:
    """Return the chips that have a description."""
    return tuple(_facts()["chips"])


def compute_capability(chip: Chip) -> str | None:
    """Return the compute capability of a chip that has a description, such as ``9.0``; None for others."""
    row = _facts()["chips"].get(chip.name)
    return None if row is None else str(row["compute_capability"])


def gpu_target(chip: Chip) -> str:
    """Return a chip as XLA's GpuTargetConfigProto, in protobuf's text format.

    Only fields that the oldest supported JAX knows are written: a parser of text format refuses others.

    Raises:
      KeyError: `gpu_targets.toml` has no such chip.
    """
    facts = _facts()
    row = dict(facts["chips"][chip.name])
    capability = dict(facts["capability"][row["compute_capability"]])
    major, minor = (int(part) for part in row.pop("compute_capability").split("."))
    matrix_clock = row.pop("matrix_clock_rate_ghz")
    del row["sources"]
    units = {
        "scalar_unit_description": (capability.pop("scalar_units"), row["clock_rate_ghz"]),
        "matrix_unit_description": (capability.pop("matrix_units"), matrix_clock),
    }
    name = chip.device_kinds[0]
    info = {
        **facts["every"],
        "cuda_compute_capability": {
            "major": major,
            "minor": minor,
            "feature_extension": _Word(capability.pop("feature_extension")),
        },
        **capability,
        **row,
        **{unit: {"rate_infos": _rates(types, clock)} for unit, (types, clock) in units.items()},
        "device_vendor": "NVIDIA Corporation",
        "name": name,
        "pcie_bandwidth": int(chip.host_link_bytes_per_second_per_chip or 0),
        "device_interconnect_info": {"active_links": chip.links_per_chip or 0},
        "runtime_version": facts["software"]["cuda"],
        "dnn_version": facts["software"]["cudnn"],
    }
    cudnn = dict(
        zip(("major", "minor", "patch"), map(int, facts["software"]["cudnn"].split(".")), strict=True)
    )
    config = {
        "gpu_device_info": info,
        "platform_name": "CUDA",
        "dnn_version_info": cudnn,
        "device_description_str": name,
    }
    return "\n".join(_text(config))


class _Word(str):
    """The name of an enumeration value, which text format writes without quotes."""

    __slots__ = ()


def _rates(types: Mapping[str, tuple[int, int]], clock_ghz: float) -> list[dict[str, Any]]:
    numbers = _facts()["primitive_types"]
    return [
        {
            "key": numbers[name],
            "value": {"clock_rate_ghz": clock_ghz, "units_per_core": units, "ops_per_clock": operations},
        }
        for name, (units, operations) in types.items()
    ]


def _text(message: Mapping[str, Any]) -> Iterator[str]:
    for field, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield f"{field} {{"
                yield from _text(item)
                yield "}"
            elif isinstance(item, bool):
                yield f"{field}: {str(item).lower()}"
            elif isinstance(item, str) and not isinstance(item, _Word):
                yield f'{field}: "{item}"'
            else:
                yield f"{field}: {item}"
