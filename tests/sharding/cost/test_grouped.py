"""Products of rows with their group's matrix, by hand: a chip of round rates, groups of whole tiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from meshwright.sharding.cost.calibration import Calibration
from meshwright.sharding.cost.grouped import GroupedWork, grouped_seconds
from meshwright.sharding.hardware.chip import chips

CHIP = dataclasses.replace(chips()["h100"], hbm_bytes_per_second=1e12)
FREE = Calibration()
# 2 groups of 65,536 rows: tiles of 4096, 16 of each group.
WORK = GroupedWork(groups=2, rows=65536, columns=2048, contraction=1024, item_bytes=2)
TILE, MATRIX = 4096, 2048 * 1024


def seconds(kernel: str = "tiles", chip: Any = CHIP, peak: float = 1e15, **changes: Any) -> tuple[float, ...]:
    found = grouped_seconds(WORK, kernel, chip, dataclasses.replace(FREE, **changes), peak)
    return dataclasses.astuple(found)


def test_a_tile_takes_its_flops_where_these_are_slow() -> None:
    copied = 2 * 2 * MATRIX * 2 / 1e12
    one = 32 * 2.0 * TILE * MATRIX / 1e12
    product, of_rows, of_matrices = seconds(peak=1e12)
    assert product == of_rows == pytest.approx(one + copied)
    # A sum is written once a group, in float32 and then as the matrix is.
    assert of_matrices == pytest.approx(one + 2 * MATRIX * (2 + 8) / 1e12)


def test_a_tile_takes_its_bytes_where_products_are_fast() -> None:
    rows = TILE * (2048 + 1024) * 2
    product, _, of_matrices = seconds(peak=1e18)
    assert product == pytest.approx((32 * (rows + 2 * MATRIX) + 2 * 2 * MATRIX * 2) / 1e12)
    assert of_matrices == pytest.approx((32 * (rows + 8 * MATRIX) + 2 * MATRIX * 10) / 1e12)


def test_a_host_is_told_in_every_turn_whether_a_loop_goes_on() -> None:
    """Of a product, and of both gradients together, which one loop takes."""
    waited = [a - b for a, b in zip(seconds(turn_seconds=1e-5), seconds(), strict=True)]
    assert waited == pytest.approx([32e-5, 16e-5, 16e-5])


def test_a_kernel_reads_rows_once_for_each_block_of_columns() -> None:
    """Tiles of 512 rows, blocks of 1024 columns; the memory's rate is what a TPU's compiler counts on."""
    chip = dataclasses.replace(chips()["v5p"], hbm_bytes_per_second=1e12)
    product, of_rows, of_matrices = seconds(
        "megablox", chip, 1e18, fusion_efficiency=0.5, memory_efficiency=0.4
    )
    tiles, matrix = 2 * 65536 / 512, MATRIX * 2
    assert product == pytest.approx(tiles * (512 * (1024 * 2 + 2048) * 2 + matrix) / 0.5e12)
    assert of_rows == pytest.approx(tiles * (512 * (2048 * 1 + 1024) * 2 + matrix) / 0.5e12)
    assert of_matrices == pytest.approx((tiles * 512 * (1024 * 2 + 2048 * 1) * 2 + 2 * matrix) / 0.5e12)


def test_a_kernels_units_are_busy_for_a_part_of_its_blocks() -> None:
    chip = dataclasses.replace(chips()["v5p"], hbm_bytes_per_second=1e15)
    assert seconds("megablox", chip, 1e12)[0] == pytest.approx(2 * 2 * 65536 * MATRIX / 1e12 / 0.95)
