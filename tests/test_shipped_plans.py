"""Every plan under configs/plans belongs to its config, compiles for its topology and does what it did."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest
from meshwright.runtime.config import load
from meshwright.runtime.train import build_model, optimizer
from meshwright.runtime.train.planning import Shapes, plan_config
from meshwright.sharding import Plan

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import quick
import ship_plans

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PLANS = sorted((CONFIGS / "plans").glob("*.plan.json"))
# `ship_plans.py --check` compiles all of them, whole. Here are those that show what others do not.
# For GPUs, in so many layers: a mixture whose first three are dense.
COMPILED = {"deepseek-v3.h100-256x8": 5}
# For TPUs, scheduled in all of their layers: all kinds (stages, several slices, what is kept on hosts, a
# sequence over chips, mixtures), and of dense layers over `fsdp` on one slice a plan for each chip, the
# quickest to schedule. Kernels are made into machine code in the same sizes where those are tested.
SCHEDULED = [
    one
    for one in quick.shipped()
    if one not in {("llama3-8b", "v6e:16x16"), ("llama3-70b", "v5p:8x8x8"), ("llama3-405b", "v5p:8x8x16")}
]


def test_each_is_one_that_the_benchmark_writes_and_checks() -> None:
    written = [ship_plans.path_of(name, at) for name, slices in ship_plans.SHIPPED.items() for at in slices]
    assert sorted(written) == PLANS


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_it_names_no_place_of_a_machine(path: pathlib.Path) -> None:
    text = path.read_text()
    assert '"file": "/' not in text
    assert not re.search(r"""(^|[\s("'])/[^\s"']*\.py""", text)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_it_is_the_plan_of_its_config(path: pathlib.Path) -> None:
    config = CONFIGS / f"{path.name.partition('.')[0]}.yaml"
    made = Plan.load(path)
    assert made.proof is not None
    words = [f"plan={path}", f"topology={made.topology}"]
    assert plan_config(load(config, words)).plan == made


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_the_lines_of_its_proof_are_of_files_that_are_here(path: pathlib.Path) -> None:
    proof = Plan.load(path).proof
    assert proof is not None
    files = {row.source.file for row in proof.collectives if row.source is not None}
    assert any(file.startswith("models/") for file in files)
    assert all((CONFIGS.parent / file).exists() for file in files if file.startswith("models/"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_for_its_topology(name: str) -> None:
    """In a reduced number of layers, which the collectives of a scanned layer do not change in kind."""
    path = CONFIGS / "plans" / f"{name}.plan.json"
    made = Plan.load(path)
    assert made.proof is not None
    config = load(CONFIGS / f"{path.name.partition('.')[0]}.yaml", [f"topology={made.topology}"])
    model = config.model.model_copy(
        update={"overrides": {**config.model.overrides, "layers": COMPILED[name]}}
    )
    built = build_model(model)
    shapes = Shapes.of(config, built)
    update = optimizer.build(config.optimizer, optimizer.schedule(config.optimizer, 100), built.names)
    sized = made.resized(shapes.params, shapes.batch, shapes.state)
    small = sized.verify(shapes.loss, shapes.params, shapes.batch, update, state=shapes.state)
    assert small.proof is not None
    assert small.proof.peak_bytes < made.proof.peak_bytes
    if small.proof.versions == made.proof.versions:
        assert quick.kinds(made.proof, 0.05) <= quick.kinds(small.proof)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "topology"), SCHEDULED)
def test_it_is_scheduled_to_what_its_proof_says(config: str, topology: str) -> None:
    """On TPUs, in all of its layers: a step that changed, and no longer fits, has another peak."""
    found = quick.beside(config, topology)
    if found.quick.versions == found.whole.versions:
        assert found.alike, (found.peak, found.others)
