"""Calibration: rows of a known record are fitted to it, devices are timed, plans take the file up."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from meshwright.runtime.calibrate import calibrate
from meshwright.runtime.calibrate.fit import fit
from meshwright.runtime.config.config import load as load_config
from meshwright.runtime.train.planning import plan_config, plan_of
from meshwright.sharding import Topology, plan
from meshwright.sharding.cost.calibration import Calibration
from meshwright.sharding.cost.collectives import links
from meshwright.sharding.cost.compute import product_share
from meshwright.sharding.cost.measured import Measurement, load, save
from meshwright.sharding.errors import UserError

HOST = Topology.parse("h200:8")
TRUE = Calibration(
    matmul_efficiency=0.7,
    matmul_half_size=64.0,
    unaligned_efficiency=0.4,
    memory_efficiency=0.9,
    optimizer_efficiency=0.8,
    fabric_efficiency=0.75,
    fabric_seconds=2e-6,
)


def rows_of(record: Calibration) -> list[dict]:
    chip, rows = HOST.chip, []
    for sizes in ((8192, 8192, 8192), (8192, 2048, 2048), (8192, 768, 768), (4096, 50257, 768)):
        share = float(product_share(np.array([sizes], float), record, 8)[0])
        seconds = 2.0 * np.prod(np.array(sizes, float)) / (chip.peak_bf16_flops * share)
        roles = dict(zip(("rows", "columns", "contraction"), sizes, strict=True))
        rows.append({"kind": "product", "dtype": "bfloat16", **roles, "seconds": seconds})
    for kind, share in (
        ("elementwise", record.memory_efficiency),
        ("optimizer", record.optimizer_efficiency),
    ):
        rows.append({"kind": kind, "bytes": 1e9, "seconds": 1e9 / (chip.hbm_bytes_per_second * share)})
    link = links({"fsdp": 8}, HOST, record)["fsdp"]
    for kind in ("all_gather", "all_reduce", "reduce_scatter"):
        for size in (2**16, 2**20, 2**26):
            seconds = link.collective(kind, float(size))
            rows.append({"kind": kind, "axis": "fabric", "devices": 8, "bytes": size, "seconds": seconds})
    return rows


def test_what_a_record_would_take_is_fitted_to_that_record() -> None:
    found = fit(rows_of(TRUE), HOST.chip)
    assert found == pytest.approx({name: getattr(TRUE, name) for name in found}, rel=1e-3)
    assert set(found) >= {"matmul_half_size", "unaligned_efficiency", "fabric_seconds"}


def problem() -> tuple:
    params = {"w": jax.ShapeDtypeStruct((4096, 4096), "bfloat16")}
    return lambda p, x: (x @ p["w"]).sum(), params, jax.ShapeDtypeStruct((4096, 4096), "bfloat16")


def test_a_plan_takes_up_the_file_that_it_is_named_and_holds_its_digest(tmp_path) -> None:
    file = tmp_path / "h200.json"
    slow = Measurement(
        chip="h200", jax="0.11", efficiencies={"matmul_efficiency": 0.1, "matmul_half_size": 0}
    )
    save(slow, file)
    shipped, measured = plan(*problem(), topology=HOST), plan(*problem(), topology=HOST, calibration=file)
    assert measured.calibration == slow.digest == load(file).digest
    assert measured.estimate.time["compute/matmul"] > 3.0 * shipped.estimate.time["compute/matmul"]
    assert any("measured with JAX 0.11, and this is JAX" in note for note in measured.notes)
    save(dataclasses.replace(slow, jax=jax.__version__), file)
    again = plan(*problem(), topology=HOST, calibration=file)
    assert not any("measured with JAX" in note for note in again.notes)
    assert shipped.calibration is None
    assert "calibration" not in shipped.to_dict()
    assert type(measured).from_dict(measured.to_dict()).calibration == slow.digest
    with pytest.raises(UserError, match="calibration is of h200, and the plan for h100"):
        plan(*problem(), topology="h100:8", calibration=file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no calibration file .*meshwright calibrate"),
        ("[", "is no calibration"),
        ("{}", "no calibration of format 1"),
        ('{"format": 1, "chip": "h200", "jax": "1", "efficiencies": {"matmul": 1}}', "no 'matmul'"),
        ('{"format": 1, "chip": "h200", "jax": "1", "efficiencies": {"memory_efficiency": 0}}', "above 0"),
        ('{"format": 1, "chip": "h200", "jax": "1", "efficiencies": {"memory_efficiency": "x"}}', "a number"),
        ('{"format": 1, "chip": 3, "jax": "1", "efficiencies": {}}', "chip is 3"),
        ('{"format": 1, "chip": "h200", "jax": "1", "efficiencies": {}, "who": 1}', "it has who"),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(tmp_path, content, said) -> None:
    file = tmp_path / "c.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=said) as told:
        load(file)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_the_devices_here_are_timed_and_a_config_is_planned_by_it(tmp_path) -> None:
    told = []
    found = calibrate(18.0, said=told.append)
    assert (found.chip, found.jax) == ("cpu", jax.__version__)
    assert list(found.measured) == told
    kinds = {row["kind"] for row in told}
    assert "product" in kinds
    assert {"matmul_efficiency", "matmul_half_size"} <= set(found.efficiencies)
    file = tmp_path / "here.json"
    save(found, file)
    words = [f"calibration={file}", "plan=auto"]
    quickstart = plan_config(load_config("configs/quickstart.yaml", words))
    assert quickstart.plan.calibration == found.digest

    kept = tmp_path / "kept.plan.json"
    quickstart.plan.save(kept)
    other = dict(found.efficiencies, memory_efficiency=0.5)
    save(Measurement(chip="cpu", jax="x", efficiencies=other), file)
    config = load_config("configs/quickstart.yaml", [f"calibration={file}", f"plan={kept}"])
    with pytest.raises(UserError, match="was not planned by"):
        plan_of(config, quickstart.shapes, Topology.parse(quickstart.plan.topology), quickstart.optimizer)


def test_no_time_is_told() -> None:
    with pytest.raises(UserError, match="above 0"):
        calibrate(0.0)
