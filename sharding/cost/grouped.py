"""Seconds of products of rows with the matrix of their group, by what multiplies them (`ops.products`).

Rows of a group are cut into tiles, the last of them half empty. A tile's product takes its flops at what
products of its sizes reach, or its bytes at the memory's rate; which bytes, the kernel's loop says:

- XLA's loop over tiles reads rows and matrix and writes rows for each tile, copies the matrix out of its
  stack once a group, and for the gradient of the matrices reads and writes a float32 sum for each tile. A
  device of which the host is to know when such a loop ends waits for it in every turn (`turn_seconds`).
- A kernel reads blocks: rows once for each block of columns, the matrix once for each tile; for the gradient
  of the matrices both kinds of rows, once for each block of the other's columns. It reads one block while it
  multiplies another, at the rate that a compiler counts on. How long matrix units are busy with a block,
  ``products.toml`` says (`busy`).

The Estimate prices a plan by this, and what reads a compiled program takes the same shares and waits.
"""

from __future__ import annotations

import dataclasses
import math

from ..hardware.chip import Chip
from ..ops.grouped import TILES
from ..ops.products import grouping_of, product_facts, side_of
from .calibration import Calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedWork:
    """A product of `groups` of so many `rows` each with their group's matrix, of `item_bytes` an element.

    All are a device's own, without padding.
    """

    groups: float
    rows: float
    columns: float
    contraction: float
    item_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedSeconds:
    """Seconds of one run: of the product, and of the gradients of its rows and of its matrices."""

    product: float
    of_rows: float
    of_matrices: float


def busy_of(kernel: str) -> float:
    """Return the share of a plain product's rate that matrix units reach within a kernel's blocks."""
    return 1.0 if kernel == TILES else float(product_facts()[kernel]["busy"])


def streaming_rate(chip: Chip, calibration: Calibration) -> float:
    """Return the bytes a second of a kernel that reads one block while it works on another.

    A TPU's compiler counts on `fusion_efficiency` of the memory's rate. Elementwise work may reach less: it
    takes turns at reading and writing.
    """
    of_compiler = calibration.fusion_efficiency if chip.platform == "tpu" else 0.0
    return (chip.hbm_bytes_per_second or math.inf) * max(calibration.memory_efficiency, of_compiler)


def grouped_seconds(
    work: GroupedWork, kernel: str, chip: Chip, calibration: Calibration, peak: float
) -> GroupedSeconds:
    """Return the seconds of one run of `work` by `kernel`, a large product of which reaches `peak` flops."""
    groups = max(1, round(work.groups))
    rows = max(1, round(work.rows))
    grouping = grouping_of(kernel, groups * rows, groups)
    tiles, tile = grouping.even / grouping.tile, float(grouping.tile)
    size, wide, deep = float(work.item_bytes), work.columns, work.contraction
    matrix = wide * deep
    flops = 2.0 * tile * matrix / (peak * busy_of(kernel))
    if kernel == TILES:
        rate = (chip.hbm_bytes_per_second or math.inf) * calibration.memory_efficiency
        moved = (matrix + tile * (wide + deep)) * size / rate
        summed = tile * (wide + deep) * size / rate
        # The float32 sum is read and written beside the product that is added to it.
        summed = max(flops, summed + 2.0 * matrix * 4.0 / rate) + calibration.turn_seconds / 2
        copied = groups * 2.0 * matrix * size / rate
        each = max(flops, moved)
        # Both gradients are taken in one loop.
        return GroupedSeconds(
            product=tiles * (each + calibration.turn_seconds) + copied,
            of_rows=tiles * (each + calibration.turn_seconds / 2) + copied,
            of_matrices=tiles * summed + groups * matrix * (size + 8.0) / rate,
        )
    rate = streaming_rate(chip, calibration)
    across, along = (
        math.ceil(wide / side_of(kernel, wide, size)),
        math.ceil(deep / side_of(kernel, deep, size)),
    )
    moved = tile * (deep * across + wide) * size + matrix * size
    back = tile * (wide * along + deep) * size + matrix * size
    summed = tile * (deep * across + wide * along) * size
    return GroupedSeconds(
        product=tiles * max(flops, moved / rate),
        of_rows=tiles * max(flops, back / rate),
        of_matrices=max(tiles * flops, (tiles * summed + groups * matrix * size) / rate),
    )
