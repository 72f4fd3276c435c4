"""One row of the measured runs as a program, a topology and a candidate."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.sharding import Topology
from meshwright.sharding.errors import UserError
from meshwright.sharding.hardware.chip import chip_named
from meshwright.sharding.hardware.topology import read as read_topology

from .layouts import read_layout
from .run import Run
from .shapes import Architecture, NotExpressible, read_shape, whole

_CLUSTERS = Path(__file__).with_name("clusters.toml")
_FRAMEWORKS = Path(__file__).parents[1] / "frameworks" / "facts.toml"
# No step's share of what its largest products alone reach is above this.
_WHOLE_STEP = 0.85


def csv_file(text: str) -> Path:
    """Return the path of a CSV that an argument names, or say that there is none."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"no file {text}")
    return Path(text)


def load(path: Path) -> tuple[list[Run], list[tuple[str, str, str]]]:
    """Return the rows of a CSV, and (source, label, reason) of those that cannot be expressed."""
    runs, left = [], []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                runs.append(parse(row))
            except NotExpressible as error:
                left.append((row["source"], _label(row), str(error)))
    return runs, left


def _label(row: Mapping[str, str]) -> str:
    degrees = " ".join(
        f"{k}{row[k]}" for k in ("dp", "tp", "sp", "cp", "pp", "ep") if row[k] not in ("", "1", "0")
    )
    return f"{row['model']} {row['n_devices']}x{row['hardware'][:12]} {degrees} mb{row['microbatch'] or '?'}"


@functools.cache
def _table(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def parse(row: Mapping[str, str]) -> Run:
    """Read one row. Raises NotExpressible."""
    architecture = read_shape(row)
    frameworks = _table(_FRAMEWORKS)
    framework = {**frameworks["default"], **frameworks.get(row["framework"], {})}
    replicated = framework.pop("replicated", {})
    if row["fsdp_zero_stage"] in ("", "0") and not framework["zero"]:
        framework |= replicated
    precision = row["precision"].lower()
    topology = _topology(row)
    low = "fp8" in precision or "float8" in precision or (not precision and _beyond_wide(row, topology))
    if "nvfp4" in precision:
        raise NotExpressible("4-bit products")
    framework = {**framework, "calibration": framework["calibration"] + _variant(row, low)}
    if "LoRA" in row["model"]:
        raise NotExpressible("LoRA: most parameters are frozen")
    return Run(
        source=re.sub(r" (line|L)\s?\d.*", "", row["source"]),
        cell=tuple(row[k] for k in ("model", "hardware", "n_devices", "global_batch_seqs", "seq_len")),
        label=_label(row),
        architecture=architecture,
        topology=topology,
        layout=read_layout(row, architecture, topology, framework),
        framework=framework,
        dtype="float8_e4m3fn" if low else "bfloat16",
        seconds=_seconds(row, architecture, framework),
        peak_bytes=float(row["peak_mem_GB_per_device"]) * 2**30 if row["peak_mem_GB_per_device"] else None,
    )


def _beyond_wide(row: Mapping[str, str], topology: Topology) -> bool:
    """Whether a row's model flops are more than a whole step reaches where products are in 16 bits."""
    ceiling = topology.chip.measured_matmul_bf16_flops
    stated = row["measured_tflops_per_device"]
    return bool(stated and ceiling and float(stated) * 1e12 > _WHOLE_STEP * ceiling)


def _variant(row: Mapping[str, str], low: bool) -> str:
    """Return what the calibration file adds to a framework's name for the way that a row runs it."""
    return "".join(
        f"-{name}"
        for name, here in (
            ("selective", row["recompute"].startswith("selective (attention core)")),
            ("fp8", low),
            # Scales of their own for rows of products cost more than the products save.
            ("rowwise", low and "rowwise" in row["precision"]),
            # Exchanges of activations that are cut up and run beside the products.
            ("async", bool(re.search(r"(?i)async ?tp", row["notes"]))),
        )
        if here
    )


def _topology(row: Mapping[str, str]) -> Topology:
    text = f"{row['hardware']} {row['source']}"
    if re.search(r"MI355|H800|V100|TPU v3", row["hardware"]):
        raise NotExpressible(f"{row['hardware'].split()[0]} is not in chips.toml")
    cluster = next((c for c in _table(_CLUSTERS)["cluster"] if re.search(c["match"], text)), None)
    if cluster is None:
        raise NotExpressible(f"hardware {row['hardware']!r} is not known")
    facts = {k: v for k, v in cluster.items() if k not in ("match", "chip")}
    chip = dataclasses.replace(chip_named(cluster["chip"]), **facts)
    devices = whole(row, "n_devices")
    if chip.torus_dims:
        return _torus(chip.name, devices, row)
    per_host = min(devices, chip.chips_per_host or devices)
    if devices % per_host:
        raise NotExpressible(f"{devices} devices are no whole hosts of {per_host}")
    return Topology(chip=chip, shape=(devices // per_host, per_host))


def _torus(chip: str, devices: int, row: Mapping[str, str]) -> Topology:
    slices = re.search(r"x(\d+)(?: slices)?$", row["hardware"])
    count = int(slices[1]) if slices else 2 if "2 pods" in row["hardware"] else 1
    each = devices // count
    dims = 2 if chip in ("v5e", "v6e") else 3
    for shape in _shapes(each, dims):
        try:
            return read_topology(f"{count}*{chip}:{'x'.join(map(str, shape))}")
        except UserError:
            continue
    raise NotExpressible(f"no {chip} slice has {each} chips")


def _shapes(chips: int, dims: int) -> list[tuple[int, ...]]:
    """Return shapes of `chips` chips, the most cubic first."""
    if dims == 1:
        return [(chips,)]
    found = [
        (a, *rest)
        for a in range(1, chips + 1)
        if chips % a == 0
        for rest in _shapes(chips // a, dims - 1)
        if a <= rest[0]
    ]
    return sorted(found, key=lambda shape: max(shape) - min(shape))


def _seconds(
    row: Mapping[str, str], architecture: Architecture, framework: Mapping[str, Any]
) -> float | None:
    if row["kind"] in ("oom", "failed_or_oom"):
        return None
    if row["measured_step_time_s"]:
        return float(row["measured_step_time_s"])
    if row["tokens_per_s_per_device"]:
        tokens = architecture.batch * architecture.sequence
        return tokens / float(row["tokens_per_s_per_device"]) / whole(row, "n_devices")
    counts = framework["tflops"]
    if row["measured_tflops_per_device"] and counts:
        again = 4.0 / 3.0 if counts == "with recompute" else 1.0
        rate = float(row["measured_tflops_per_device"]) * 1e12 * whole(row, "n_devices")
        return again * architecture.step_flops / rate
    raise NotExpressible("no step time, no tokens per second, and flops of unknown counting")
