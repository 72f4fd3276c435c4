"""The few efficiencies of a chip under a framework, as a record that TOML files hold."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest

_DEFAULT = Path(__file__).with_name("calibration.toml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What datasheets do not say. Shares are of the datasheet's rate; overlaps are shares of what could hide.

    matmul_efficiency:     of the peak, for products large in every role.
    matmul_half_size:      the size of a role at which a product is half as fast as for a large one.
    unaligned_efficiency:  of what an aligned product reaches, for one with a role not a multiple of eight.
    attention_efficiency:  of the peak, for a fused attention kernel.
    attention_share:       of all scores, how many are computed (1/2: the hidden half is skipped).
    attention_gradient:    the work of the kernel's backward pass over that of its forward pass.
    fused_attention:       whether scores stay on the chip.
    keeps_scores:          whether scores that do not stay on the chip are kept for the backward pass, rather
                           than run again.
    fused_residuals:       whether what is saved is what fused kernels read rather than each operation.
    reruns_layers:         whether all of a layer that is not kept is run again, needed or not.
    gathered_residuals:    whether what was gathered for a product is kept gathered for its gradient.
    reduces_whole:         whether a gradient that is a partial sum over several axes is reduced whole over
                           all of them each microbatch, as XLA does for GPUs, rather than axis by axis.
    accumulates_in_place:  whether a microbatch's gradients are added up where they are made; otherwise those
                           of one and their sum lie in memory.
    memory_efficiency:     of the HBM's rate, for elementwise work.
    loss_passes:           how often a loss that is no single kernel goes over the logits for each time that
                           one would.
    loss_copies:           arrays as large as the logits that it holds at once, besides those it keeps.
    kernel_seconds:        host's time for one kernel; a step is never faster than its kernels are issued.
    layer_seconds:         host's time for a layer that no computing hides: where a framework waits for the
                           device.
    microbatch_seconds:    host's time for a microbatch.
    step_seconds:          host's time for a step.
    fabric_efficiency, network_efficiency: of the links' rate, for collectives.
    fabric_group_exponent: of the group's share of its domain, in the efficiency: small groups use few links.
    fabric_seconds, network_seconds: start of a collective for each device it visits; each domain besides.
    pipelined_starts:      how much longer exchanging activations takes to start while stages talk as well.
    overlap_parameters, overlap_host, overlap_gradients, overlap_shards, overlap_activations, overlap_stages:
                           the share of the computing beside it that can hide gathering parameters, sending
                           values to the host and back, reducing gradients
                           once a step, the same where each device updates its share (ZeRO-1), exchanging
                           activations (a share of these), passing them to the next stage.
    optimizer_efficiency:  of the HBM's rate, for the optimizer.
    product_cycles:        of the cycles that a TPU's compiler estimates for products, how many its
                           schedules of them take.
    fusion_efficiency:     of the HBM's rate, what a TPU's compiler counts on for elementwise work in float32.
    imbalance_per_doubling: how much slower the slowest device makes a step each time their number doubles.
    balanced_stages:       whether layers are dealt to stages so that the loss's products count as layers do,
                           rather than evenly.
    copy_bytes:            held for each parameter that a device computes with, besides the parameter, its
                           gradient and the optimizer's arrays: buckets, flat copies.
    memory_overhead:       bytes over those counted of what comes and goes within a step, as a share: what an
                           allocator cannot use again.
    fragmentation:         places that an allocator leaves free between arrays, as a share of what comes and
                           goes within a step; they are needed and hold nothing.
    usable_memory:         of a device's memory, before what allocates it thrashes or gives up.
    reserved_bytes:        what the framework holds on each device besides.
    """

    matmul_efficiency: float = 1.0
    matmul_half_size: float = 0.0
    unaligned_efficiency: float = 1.0
    attention_efficiency: float = 1.0
    attention_share: float = 1.0
    attention_gradient: float = 2.0
    fused_attention: bool = False
    keeps_scores: bool = True
    fused_residuals: bool = False
    reruns_layers: bool = False
    gathered_residuals: bool = False
    reduces_whole: bool = False
    accumulates_in_place: bool = False
    memory_efficiency: float = 1.0
    loss_passes: float = 1.0
    loss_copies: float = 1.0
    kernel_seconds: float = 0.0
    layer_seconds: float = 0.0
    microbatch_seconds: float = 0.0
    step_seconds: float = 0.0
    fabric_efficiency: float = 1.0
    fabric_group_exponent: float = 0.0
    fabric_seconds: float = 0.0
    network_efficiency: float = 1.0
    network_seconds: float = 0.0
    pipelined_starts: float = 1.0
    overlap_parameters: float = 0.0
    overlap_host: float = 0.0
    overlap_gradients: float = 0.0
    overlap_shards: float = 0.0
    overlap_activations: float = 0.0
    overlap_stages: float = 0.0
    optimizer_efficiency: float = 1.0
    product_cycles: float = 1.0
    fusion_efficiency: float = 0.8
    imbalance_per_doubling: float = 0.0
    balanced_stages: bool = False
    copy_bytes: float = 0.0
    memory_overhead: float = 0.0
    reserved_bytes: float = 0.0
    fragmentation: float = 0.0
    usable_memory: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_efficiency") and not value > 0:
                raise UserError(f"{field.name}={value} must be above 0")
            if isinstance(value, (int, float)) and value < 0:
                raise UserError(f"{field.name}={value} must not be below 0")


def from_dict(row: Mapping[str, Any]) -> Calibration:
    """Return the record of plain values. Raises UserError for a key that is none of its fields."""
    known = [field.name for field in dataclasses.fields(Calibration)]
    for key in row:
        if key not in known:
            raise UserError(f"a calibration has no {key!r}; {nearest(key, known)}")
    return Calibration(**row)


def read(path: str | Path) -> dict[str, dict[str, Calibration]]:
    """Return chip → framework → record from a TOML file; every table starts from ``[default]``.

    A chip's own ``default`` is under its frameworks.
    """
    try:
        with Path(path).open("rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"no calibration file {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    base = tables.pop("default", {})
    found: dict[str, dict[str, Calibration]] = {"default": {"default": from_dict(base)}}
    for chip, rows in tables.items():
        own = {**base, **rows.get("default", {})}
        found[chip] = {"default": from_dict(own)}
        for framework, row in rows.items():
            if framework != "default":
                found[chip][framework] = from_dict({**own, **row})
    return found


@functools.cache
def _shipped() -> dict[str, dict[str, Calibration]]:
    return read(_DEFAULT)


def calibration_for(chip: str, framework: str = "default", path: str | Path | None = None) -> Calibration:
    """Return the record of `chip` under `framework`, or the nearest wider one.

    A variant (``torchtitan-fp8``) is its framework where the chip has no record of it; a framework that the
    chip has no record of is the chip's default.
    """
    tables = _shipped() if path is None else read(path)
    rows = tables.get(chip, tables["default"])
    while framework not in rows and "-" in framework:
        framework = framework.rpartition("-")[0]
    return rows.get(framework, rows["default"])


def write(path: str | Path, tables: Mapping[str, Mapping[str, Calibration]], note: str = "") -> None:
    """Write chip → framework → record as TOML; `note` is a comment at the top."""
    lines = [f"# {line}".rstrip() for line in note.splitlines()]
    base = tables.get("default", {}).get("default", Calibration())
    for chip, rows in sorted(tables.items(), key=lambda item: (item[0] != "default", item[0])):
        own = rows.get("default", base)
        for framework, row in sorted(rows.items(), key=lambda item: (item[0] != "default", item[0])):
            under = base if framework == "default" else own
            header = "default" if chip == "default" else f'{chip}."{framework}"'
            if chip == "default":
                under = Calibration()
            lines += ["", f"[{header}]"]
            for field in dataclasses.fields(Calibration):
                value = getattr(row, field.name)
                if value != getattr(under, field.name) or chip == "default":
                    text = str(value).lower() if isinstance(value, bool) else f"{value:.4g}"
                    lines.append(f"{field.name} = {text}")
    Path(path).write_text("\n".join(lines).lstrip() + "\n")
