"""A run of a model that changes beside its parameters, some of which are not trained."""

from __future__ import annotations

import pathlib

import pytest
from meshwright.runtime.config import load
from meshwright.runtime.train import plan_config, train
from meshwright.sharding import Plan, UserError
from training import metrics

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("compilation_cache_as_it_was")]
WORDS = (
    "topology=cpu:8",
    "model={build: small_models:changing, trainable: {table: false}}",
    "train.evaluate_every=2",
    "train.evaluate_batches=1",
    "train.sample=null",
    "compilation_cache=null",
)


@pytest.mark.devices(8)
def test_it_is_trained_evaluated_saved_and_resumed(
    small_config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Two steps on one mesh and two on another are four on one."""

    def run(folder: str, *words: str) -> list[dict[str, float]]:
        assert train(load(small_config, (*WORDS, *words, f"run={tmp_path / folder}"))) == 0
        return metrics(tmp_path / folder)

    run("parts", "mesh={data: 2, fsdp: 2, tensor: 2}", "train.steps=2")
    parts = run("parts", "mesh=null", "plan=auto", "train.steps=4")
    whole = run("whole", "mesh={fsdp: 8}", "train.steps=4")
    for name in ("loss", "eval_loss"):
        found, wanted = ([row[name] for row in rows if name in row] for rows in (parts, whole))
        assert found == pytest.approx(wanted, rel=2e-5)
    assert len(whole) == 4
    plan = Plan.load(tmp_path / "whole" / "plan.json")
    assert plan.trainable == ("unembed", "up")
    assert plan.state is not None


def test_a_plan_of_other_trained_parameters_is_refused(
    small_config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = (*WORDS, "mesh={fsdp: 8}")
    plan_config(load(small_config, words)).plan.save(tmp_path / "x.plan.json")
    other = (*WORDS, "mesh=null", f"plan={tmp_path / 'x.plan.json'}", "model.trainable=up")
    with pytest.raises(UserError, match=r"the config trains 1 parameters \(up, …\) and .* 2 parameters"):
        plan_config(load(small_config, other))
