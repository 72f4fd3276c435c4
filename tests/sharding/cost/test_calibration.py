"""Calibration files: read, written, fitted."""

import pytest
from meshwright.sharding.cost.calibration import Calibration, calibration_for, from_dict, read, write
from meshwright.sharding.errors import UserError


def test_a_file_comes_back_as_it_was_written(tmp_path):
    base = Calibration(matmul_efficiency=0.8, overlap_gradients=0.5)
    own = Calibration(matmul_efficiency=0.7, overlap_gradients=0.5, fused_attention=True)
    tables = {"default": {"default": base}, "h100": {"default": base, "somebody's": own}}
    write(tmp_path / "c.toml", tables, "Why.")
    assert read(tmp_path / "c.toml") == tables
    assert calibration_for("h100", "somebody's", tmp_path / "c.toml") == own
    assert calibration_for("v5e", "somebody's", tmp_path / "c.toml") == base


def test_a_variant_is_its_framework_where_nothing_else_is_known(tmp_path):
    own = Calibration(matmul_efficiency=0.7)
    write(
        tmp_path / "c.toml",
        {"default": {"default": Calibration()}, "h100": {"default": Calibration(), "x": own}},
    )
    assert calibration_for("h100", "x-fp8-async", tmp_path / "c.toml") == own
    assert calibration_for("h100", "y-fp8", tmp_path / "c.toml") == Calibration()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"matmul_eficiency.*matmul_efficiency"):
        from_dict({"matmul_eficiency": 0.5})
    with pytest.raises(UserError, match="must be above 0"):
        Calibration(memory_efficiency=0.0)
    with pytest.raises(UserError, match="no calibration file"):
        read(tmp_path / "missing.toml")


def test_every_chip_has_a_shipped_record():
    assert calibration_for("v5p").matmul_efficiency > 0.3
    assert calibration_for("cpu") == calibration_for("default")
