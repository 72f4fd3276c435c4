"""Efficiencies from what was timed: the fields of `Calibration` that timed rows tell."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from ...sharding.cost.calibration import Calibration, calibration_for
from ...sharding.cost.collectives import switched_link
from ...sharding.cost.compute import attention_share, peak_flops, product_share
from ...sharding.hardware.chip import Chip
from ...sharding.xla.compiler import compiler_for
from .collectives import FABRIC, NETWORK
from .kernels import Row

# Sizes of a product's role at which it may be half as fast, one of which is taken.
_HALVES = (0.0, 8.0, 16.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0)
_LEAST = 1e-4
# Where the fit of an axis's efficiency and start begins, and what it stays within.
_BEGIN = (0.5, 1e-6)
_BOUNDS = ((_LEAST, 1e-10), (10.0, 1.0))


def fit(rows: Sequence[Row], chip: Chip) -> dict[str, float]:
    """Return field of `Calibration` → value, of those that `rows` tell."""
    found = _products(rows, chip)
    found |= _attention(rows, chip)
    rate = chip.hbm_bytes_per_second
    if rate is not None:
        moved = [row for row in rows if row["kind"] in ("elementwise", "sum of rows")]
        found |= _share("memory_efficiency", moved, rate)
        found |= _share("optimizer_efficiency", [row for row in rows if row["kind"] == "optimizer"], rate)
    if chip.fabric_bytes_per_second_per_chip or chip.link_bytes_per_second:
        found |= _links(rows, FABRIC, chip)
    if chip.dcn_bytes_per_second_per_chip:
        found |= _links(rows, NETWORK, chip)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _share(name: str, rows: Sequence[Row], rate: float) -> dict[str, float]:
    shares = [row["bytes"] / row["seconds"] / rate for row in rows]
    return {name: max(statistics.median(shares), _LEAST)} if shares else {}


def _products(rows: Sequence[Row], chip: Chip) -> dict[str, float]:
    """Return the efficiency and half size that miss least, by squared logarithms, and odd widths' share."""
    timed = [row for row in rows if row["kind"] == "product"]
    if not timed:
        return {}
    sizes = np.array([[row[role] for role in ("rows", "columns", "contraction")] for row in timed], float)
    seconds = np.array([row["seconds"] for row in timed])
    reached = 2.0 * sizes.prod(axis=1) / seconds / peak_flops(chip, timed[0]["dtype"])
    aligned = compiler_for(chip).aligned_elements
    odd = (sizes % aligned != 0).any(axis=1) if aligned > 1 else np.zeros(len(timed), bool)
    if odd.all():
        return {}
    best: tuple[float, float, float] | None = None
    for half in _HALVES:
        ramp = np.log(product_share(sizes[~odd], Calibration(matmul_half_size=half)))
        left = np.log(reached[~odd]) - ramp
        missed = float(((left - left.mean()) ** 2).sum())
        if best is None or missed < best[0]:
            best = missed, half, float(np.exp(left.mean()))
    assert best is not None
    found = {"matmul_efficiency": best[2], "matmul_half_size": best[1]}
    if odd.any():
        even = product_share(sizes[odd], Calibration(matmul_efficiency=best[2], matmul_half_size=best[1]))
        found["unaligned_efficiency"] = float(np.clip(np.median(reached[odd] / even), _LEAST, 1.0))
    return found


def _attention(rows: Sequence[Row], chip: Chip) -> dict[str, float]:
    """Return a kernel's efficiency, its ramps over width and keys as shipped; XLA's own is no kernel."""
    timed = [row for row in rows if row["kind"] == "attention" and row["implementation"] != "xla"]
    if not timed:
        return {}
    shipped = calibration_for(chip.name)
    ratios = [_reached(row, chip) / _ramp(row, shipped) for row in timed]
    return {"attention_efficiency": max(statistics.median(ratios), _LEAST)}


def _reached(row: Row, chip: Chip) -> float:
    # Two products of causal halves forward; the gradient runs the forward pass and five more.
    products = 7.0 if row["gradient"] else 2.0
    flops = products * row["batch"] * row["heads"] * row["keys"] ** 2 * row["width"]
    return flops / row["seconds"] / peak_flops(chip, "bfloat16")


def _ramp(row: Row, shipped: Calibration) -> float:
    width, keys = np.array([float(row["width"])]), np.array([row["keys"] / 2.0])
    return float(attention_share(width, keys, shipped)[0]) / shipped.attention_efficiency


def _links(rows: Sequence[Row], axis: str, chip: Chip) -> dict[str, float]:
    """Return the efficiency and start of an axis's collectives, by which they would take what was timed.

    Each row counts by its own size, so that small ones tell the start and large ones the rate.
    """
    timed = [row for row in rows if row.get("axis") == axis]
    if len(timed) < 2:
        return {}
    shipped = calibration_for(chip.name)
    names = (f"{axis}_efficiency", f"{axis}_seconds")

    def taken(logs: Any) -> np.ndarray:
        record = dataclasses.replace(shipped, **dict(zip(names, np.exp(logs).tolist(), strict=True)))
        rates = []
        for row in timed:
            count = row["devices"]
            link = switched_link(count, count if axis == FABRIC else 1, chip, record)
            rates.append(link.collective(row["kind"], row["bytes"]) / row["seconds"])
        return np.array(rates)

    found = least_squares(lambda logs: taken(logs) - 1.0, np.log(_BEGIN), bounds=np.log(_BOUNDS))
    return dict(zip(names, np.exp(found.x).tolist(), strict=True))
