"""Calibration files: read, checked, and what of them compiled programs are read by."""

import ast
import dataclasses
from pathlib import Path

import pytest
from meshwright.sharding import Topology
from meshwright.sharding.cost import calibration, collectives, compute
from meshwright.sharding.cost.calibration import (
    Calibration,
    calibration_for,
    checked,
    compiled_part,
    read,
    read_toml,
    transferred_from,
)
from meshwright.sharding.errors import UserError
from meshwright.sharding.hardware.chip import chips

SHIPPED = Path(calibration.__file__).with_name("calibration.toml")


def test_a_chip_starts_from_the_default_and_a_kernel_from_its_chip(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        '[default]\nsource = "x"\nmatmul_efficiency = 0.8\n[h100]\nsource = "y"\noverlap_gradients = 0.5\n'
        '[h100.kernels.cudnn]\nsource = "z"\nattention_efficiency = 0.4\n'
    )
    found = read(path)
    chip = Calibration(matmul_efficiency=0.8, overlap_gradients=0.5)
    assert found == {
        ("default", None): Calibration(matmul_efficiency=0.8),
        ("h100", None): chip,
        ("h100", "cudnn"): dataclasses.replace(chip, attention_efficiency=0.4),
    }


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"matmul_eficiency.*matmul_efficiency"):
        checked(Calibration, {"matmul_eficiency": 0.5})
    with pytest.raises(UserError, match="must be above 0"):
        Calibration(memory_efficiency=0.0)
    with pytest.raises(UserError, match="no calibration file"):
        read(tmp_path / "missing.toml")


def test_every_chip_has_a_shipped_record_and_every_table_a_source():
    assert calibration_for("v5p").matmul_efficiency > 0.3
    assert calibration_for("cpu") == calibration_for("default")
    tables = read_toml(SHIPPED)
    assert set(tables) - {"default"} <= set(chips())
    kernels = [row for table in tables.values() for row in table.get("kernels", {}).values()]
    assert all(row["source"] for row in (*tables.values(), *kernels))


def test_a_kernels_efficiency_is_its_own_where_it_is_known():
    assert calibration_for("h200", "cudnn").attention_efficiency == 0.6
    assert calibration_for("v6e", "splash") == calibration_for("v6e")
    own, plain = calibration_for("v5e", "splash"), calibration_for("v5e")
    assert dataclasses.replace(own, attention_efficiency=plain.attention_efficiency) == plain


def test_proofs_are_kept_by_what_compiled_programs_are_read_by():
    """Every field that `compiled/` or its links read, and no other."""
    sources = [
        Path(collectives.__file__),
        Path(compute.__file__),
        *(SHIPPED.parents[1] / "compiled").rglob("*.py"),
    ]
    names = {field.name for field in dataclasses.fields(Calibration)}
    read_there = {
        node.attr
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("calibration")
    }
    assert set(compiled_part(Calibration())) == names & read_there


def test_a_chip_of_the_topology_has_a_calibration_that_prices():
    assert calibration_for(Topology.parse("gb200:2x4").chip.name).overlap_parameters == 0.4


def test_a_transferred_record_is_that_of_its_kin_but_for_what_it_says_itself(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        '[default]\nsource = "x"\nmatmul_efficiency = 0.8\nmemory_efficiency = 0.7\n'
        '[h200]\nsource = "y"\nmatmul_efficiency = 0.6\n'
        '[h200.kernels.cudnn]\nsource = "z"\nattention_efficiency = 0.5\n'
        '[a100]\nsource = "w"\ntransferred = "h200"\nmemory_efficiency = 0.9\n'
    )
    own = Calibration(matmul_efficiency=0.6, memory_efficiency=0.9)
    found = read(path)
    assert found["a100", None] == own
    assert found["a100", "cudnn"] == dataclasses.replace(own, attention_efficiency=0.5)
    assert transferred_from("a100") == "h200"
    assert transferred_from("v5p") is None
