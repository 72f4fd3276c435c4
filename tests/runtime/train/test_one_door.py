"""What `plan CONFIG` shows is what `train CONFIG` runs, whoever decided it; hosts notice where it is not."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import random
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import yaml
from meshwright.runtime.config import Config, load
from meshwright.runtime.train import train
from meshwright.runtime.train.job import build_job, check_same_plan
from meshwright.runtime.train.planning import plan_config
from meshwright.sharding import Plan, Topology, UserError, declare, plan
from small_models import perceptron

pytestmark = pytest.mark.numerics

CONFIGS = sorted((pathlib.Path(__file__).parents[3] / "configs").glob("*.yaml"))
# As many random declarations as the suite has seconds for.
_DECLARATIONS = 12


def declarations(seed: int) -> list[str]:
    """Settings of a layout, some of them impossible, as a user might write them."""
    chosen = random.Random(seed)
    sizes = chosen.choice([(8,), (2, 4), (4, 2), (2, 2, 2), (2, 2), (3,)])
    axes = chosen.sample(("data", "fsdp", "tensor", "context"), len(sizes))
    words: dict[str, Any] = {
        "mesh": dict(zip(axes, sizes, strict=True)),
        "remat": chosen.choice([None, "none", "dots", "full"]),
        "microbatches": chosen.choice([None, 1, 2]),
        "rules": chosen.choice([None, {"mlp": None}, {"embed": "tensor"}, {"*/up": [None, "fsdp"]}]),
        "plan": chosen.choice(["declared", "declared", "auto"]),
        "attention": chosen.choice(["auto", "xla"]),
    }
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).strip()}"
        for key, value in words.items()
        if value is not None
    ]


@pytest.mark.devices(8)
def test_random_declarations_show_what_they_train(small_config: pathlib.Path) -> None:
    """Or both refuse them, in the same sentence."""
    agreed = 0
    for seed in itertools.count():
        config = load(
            small_config, ["topology=cpu:8", "mesh=null", "train.global_batch=16", *declarations(seed)]
        )
        shown, trained = (outcome(call, config) for call in (shown_by, trained_by))
        assert shown == trained, declarations(seed)
        agreed += not isinstance(shown, str)
        if agreed >= _DECLARATIONS:
            break


def shown_by(config: Config) -> Plan:
    return plan_config(config).plan


def trained_by(config: Config) -> Plan:
    return build_job(config).plan


def outcome(call: Any, config: Config) -> Any:
    try:
        return call(config).decision()
    except UserError as error:
        return str(error)


@pytest.mark.devices(8)
def test_a_plan_file_shows_what_it_trains(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ["topology=cpu:8", "mesh={data: 4, tensor: 2}", "remat=full"]
    made = plan_config(load(small_config, words)).plan
    made.save(tmp_path / "x.plan.json")
    config = load(small_config, ["topology=cpu:8", "mesh=null", f"plan={tmp_path / 'x.plan.json'}"])
    assert shown_by(config).decision() == trained_by(config).decision() == made.decision()


@pytest.mark.devices(8)
def test_a_run_writes_the_plan_that_was_shown(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ["topology=cpu:8", "mesh={fsdp: 4, tensor: 2}", "train.steps=1", "checkpoint.every=0"]
    config = load(small_config, [*words, f"run={tmp_path / 'run'}"])
    shown = shown_by(config)
    assert train(config) == 0
    written = Plan.load(tmp_path / "run" / "plan.json")
    assert written.decision() == shown.decision()
    assert written.estimate == shown.estimate
    # One line more than the run has: what a search would take instead.
    assert [note for note in shown.notes if note not in written.notes] == [shown.notes[-1]]
    assert shown.notes[-1].startswith("plan: auto would take ")


def test_a_declared_layout_is_estimated_as_a_searched_one_is() -> None:
    """Declared again, what a search found has the estimate that it was found with."""
    model = perceptron()
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = {name: jax.ShapeDtypeStruct((16, 32), jnp.int32) for name in ("tokens", "targets")}
    given: dict[str, Any] = {"topology": "v5e:2x4", "optimizer": optax.adam(1e-3), "names": model.names}
    found = plan(model.loss, params, batch, mesh={"fsdp": 8}, remat="none", microbatches=1, **given)
    rules = {path if "/" in path else f"*{path}": list(row.spec) for path, row in found.params.items()}
    declared = declare(model.loss, params, batch, mesh={"fsdp": 8}, rules=rules, **given)
    assert (declared.params, declared.moments) == (found.params, found.moments)
    assert declared.estimate == found.estimate
    assert declared.origin == found.origin


def test_a_layout_too_large_is_declared_with_a_warning() -> None:
    config = load(
        CONFIGS[-1].with_name("llama3-70b.yaml"), ["topology=v5e:4x4", "plan=declared", "mesh={fsdp: 16}"]
    )
    made = plan_config(config).plan
    assert made.estimate is not None
    assert made.estimate.needed_bytes > 16 * 2**30
    assert any("have it compiled (--verify)" in note for note in made.notes)
    assert made.notes[-1].startswith("plan: auto has nothing to offer: nothing fits")


@pytest.mark.processes(2, devices=4)
def test_hosts_with_different_plans_are_refused() -> None:
    """They would compile different programs and wait for one another."""
    changes: list[dict[str, Any]] = [
        {"compiler_options": {"xla_tpu_enable_latency_hiding_scheduler": True}},
        {"kernels": {"attention": {"implementation": "cudnn"}}},
        {"schedule": "gpipe"},
        {"interleave": 2},
        {"topology": "cpu:2x4"},
    ]
    same = Plan(topology=Topology.parse("cpu:8"), mesh={"data": 8}, dims={}, params={}, batch={})
    check_same_plan(same)
    for change in changes:
        mine = dataclasses.replace(same, **(change if jax.process_index() else {}))
        with pytest.raises(UserError, match="process 1 has another plan than process 0"):
            check_same_plan(mine)
    check_same_plan(dataclasses.replace(same, notes=(f"noted by {jax.process_index()}",)))
