"""A config's plan tried in small: by the command in its own process, and what fails or cannot be tried."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest
from meshwright.runtime.config import Config, load, parse
from meshwright.runtime.train import plan_config
from meshwright.runtime.train.check import PlanCheck
from meshwright.runtime.train.check_worker import checked, example_batch
from meshwright.sharding import Plan, UserError, processes
from meshwright.sharding.plans.reduced import Reduction
from meshwright.sharding.transform import deviation
from meshwright.sharding.transform.compose import PlannedLoss
from meshwright.sharding.transform.deviation import Deviation
from training import command

TESTS = pathlib.Path(__file__).parents[2]
CONFIGS = TESTS.parent / "configs"
pytestmark = pytest.mark.numerics
PERCEPTRON: dict[str, Any] = {
    "topology": "v5p:2x2x4",
    "mesh": {"data": 2, "fsdp": 4, "tensor": 2},
    "microbatches": 2,
    "model": {"build": "small_models:perceptron"},
    "data": {"sequence": 64},
}


def config_of(**changed: Any) -> Config:
    return parse({**PERCEPTRON, **changed})


def test_the_command_tries_a_plan_on_devices_that_this_process_does_not_have(
    small_config: pathlib.Path,
) -> None:
    words = ["plan", small_config, "model={build: small_models:perceptron}", "topology=v5p:2x2x1"]
    blind = os.environ | {"JAX_PLATFORMS": "none_at_all", "PYTHONPATH": str(TESTS)}
    done = processes.run(command(*words, "--check", "--json"), timeout_seconds=120, env=blind)
    # A machine that is busy is told what takes long.
    assert done.stderr in ("", "running the model in small, as planned and plainly\n")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["check"]
    assert found["passes"]
    assert max(apart for apart, _ in found["types"]["its own types"]["apart"].values()) < 1e-5


@pytest.mark.devices(8)
def test_a_plan_that_computes_something_else_fails_by_the_parameter(monkeypatch: Any) -> None:
    class Wrong(PlannedLoss):
        def value_and_grad(self, *args: Any, **how: Any) -> Any:
            value, slopes = super().value_and_grad(*args, **how)
            return value, {**slopes, "up": slopes["up"] * 1.001}

    config = config_of()
    plan = plan_config(config).plan
    assert checked(config, plan).passes
    monkeypatch.setattr(deviation, "PlannedLoss", Wrong)
    found = checked(config, plan)
    assert not found.passes
    assert found.types["its own types"].worst[0] == "up"


LARGE = {"hidden": 2**17, "embed": 512}


@pytest.mark.devices(8)
def test_a_large_model_of_the_users_is_tried_with_small_dimensions() -> None:
    config = config_of(model={"build": "small_models:perceptron", "arguments": LARGE})
    found = checked(config, plan_config(config).plan)
    assert found.passes
    assert found.model["mlp"] <= 64
    assert found.model["sequence"] == 32


@pytest.mark.devices(8)
def test_a_model_that_stays_too_large_says_what_to_set() -> None:
    config = config_of(model={"build": "small_models:of_one_size", "arguments": LARGE})
    plan = plan_config(config).plan
    said = r"101,847,040 parameters, of which 69,341,184 stay .* arguments: hidden, embed"
    with pytest.raises(UserError, match=said):
        checked(config, plan)

    def with_reduced(**arguments: int) -> Config:
        model = config.model.model_copy(update={"reduced": arguments})
        return config.model_copy(update={"model": model})

    assert checked(with_reduced(hidden=32, embed=16), plan).passes
    with pytest.raises(UserError, match=r"does not go over the small model: .* divide"):
        checked(with_reduced(hidden=33, embed=15), plan)


def test_a_check_comes_back_from_its_process_as_it_was() -> None:
    how = {
        "mesh": {"expert": 2},
        "microbatches": 1,
        "interleave": 1,
        "rows": 8,
        "sequence_parts": 1,
        "layers": 2,
    }
    one = Deviation(loss=1.0, expected=2.0, apart={None: 0.1}, allowed={None: 0.2}, own=1.5, routed=(3, 64))
    check = PlanCheck(reduction=Reduction(**how), model={"experts": 8}, types={"bfloat16": one})
    assert PlanCheck.from_dict(json.loads(json.dumps(check.to_dict()))) == check


def test_rows_of_an_example_are_packed_as_those_of_a_run() -> None:
    batch = example_batch(64, 16, 11, seed=0)
    assert {array.shape for array in batch.values()} == {(64, 16)}
    assert batch["tokens"].min() >= 0
    assert batch["tokens"].max() < 11
    padding = batch["segment_ids"] == 0
    assert (batch["targets"][padding] == -1).all()
    assert padding.any()
    assert (batch["positions"][:, 0] == 0).all()
    first = batch["segment_ids"][:, 0] == 1
    assert first.all()


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["llama3-405b", "deepseek-v3"])
def test_shipped_configs_give_the_plain_function_in_small(name: str) -> None:
    # What is decided for it, as `test_frozen.py` plans it again.
    frozen = json.loads((TESTS / "frozen" / f"{name}.json").read_text())
    made = Plan.from_dict({"format": 1, **frozen["decided"]})
    assert checked(load(CONFIGS / f"{name}.yaml"), made).passes
