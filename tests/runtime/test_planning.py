"""Planning a config: on the command line, in a run, and from a file."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from meshwright.runtime.config import load
from meshwright.runtime.planning import plan_config
from meshwright.runtime.train import train
from meshwright.sharding import Plan, UserError
from training import metrics

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY = ("topology=v5e:2x4", "data.sequence=64", "train.global_batch=16")


def meshwright(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meshwright.runtime.cli", "plan", *words],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_json_has_what_was_promised(small_config: pathlib.Path) -> None:
    done = meshwright(str(small_config), *TINY, "mesh=null", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"topology", "mesh", "specs", "estimate", "alternatives", "planning_seconds"} <= set(found)
    assert set(found["estimate"]) == {"step_seconds", "mfu", "peak_bytes", "time", "memory"}
    assert found["topology"] == "v5e:2x4"
    assert found["planning_seconds"] > 0
    assert sum(found["estimate"]["time"].values()) == pytest.approx(found["estimate"]["step_seconds"])
    for row in found["alternatives"]:
        assert row["lost"]
        assert row["estimate"]["step_seconds"] > 0


def test_it_writes_what_it_shows(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    files = {"--save": tmp_path / "x.plan.json", "--html": tmp_path / "x.html"}
    words = [word for flag, path in files.items() for word in (flag, str(path))]
    done = meshwright(str(small_config), *TINY, "--topology", "h100:8", "--why", "fsdp", *words)
    assert done.returncode == 0, done.stderr
    assert "fsdp=" in done.stdout
    assert "h100:8" in files["--html"].read_text()
    assert Plan.load(files["--save"]).topology == "h100:8"


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "llama3-70b", "llama3-405b"])
def test_shipped_configs_plan_and_fit(name: str) -> None:
    made, seconds = plan_config(load(CONFIGS / f"{name}.yaml"))
    assert made.estimate is not None
    assert seconds > 0
    assert 0.05 < made.estimate.mfu < 1.0
    assert made.origin is not None


def test_what_a_config_declares_is_kept(small_config: pathlib.Path) -> None:
    words = [*TINY, "mesh={tensor: 2}", "remat=full", "microbatches=2"]
    made, _ = plan_config(load(small_config, words))
    assert made.mesh["tensor"] == 2
    assert (made.remat, made.microbatches) == ("full", 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5q:2x2"], "did you mean"),
        (["--topology", "v5p:4x4x9"], "nearest: v5p:4x4x8"),
        (["--why", "tensr"], "did you mean 'tensor'"),
        (["--save", "{nowhere}/x.json"], "x.json cannot be written: No such file or directory"),
        (["plan=missing.json"], "no plan file missing.json"),
        (["mesh={tensor: 3}"], "tensor=3 does not divide 8 devices; nearest: tensor=2 or 4"),
        (["mesh={tensr: 2}"], "did you mean 'tensor'"),
        (["microbatches=5"], "a batch of 16 rows does not divide"),
    ],
)
def test_mistakes_are_one_line(
    small_config: pathlib.Path, tmp_path: pathlib.Path, words: list[str], message: str
) -> None:
    words = [word.replace("{nowhere}", str(tmp_path / "nowhere")) for word in words]
    done = meshwright(str(small_config), *TINY, "mesh=null", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def prepared(config: pathlib.Path, *words: str) -> Any:
    return load(config, ["topology=cpu:8", "mesh=null", "train.steps=2", "checkpoint.every=0", *words])


@pytest.mark.devices(8)
def test_a_run_trains_by_a_plan_it_searched_for(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = prepared(small_config, "plan=auto", f"run={tmp_path / 'auto'}")
    assert train(config) == 0
    used = Plan.load(tmp_path / "auto" / "plan.json")
    assert used.estimate is not None
    assert used.alternatives
    again = prepared(small_config, f"plan={tmp_path / 'auto' / 'plan.json'}", f"run={tmp_path / 'file'}")
    assert train(again) == 0
    assert Plan.load(tmp_path / "file" / "plan.json") == used
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("auto", "file")]
    assert losses[0] == losses[1]


def test_a_plan_of_something_else_is_refused(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.plan.json"
    made, _ = plan_config(prepared(small_config))
    made.save(path)
    named = f"plan={path}"
    assert plan_config(prepared(small_config, named))[0] == made
    for words, message in (
        (["topology=v5e:2x4"], f"{path} is a plan for cpu:8, not for v5e:2x4"),
        (["train.global_batch=24"], "has shape"),
        (["mesh={data: 2}"], "the config declares data=2 and"),
        (["microbatches=4"], "the config declares microbatches=4 and"),
        (["rules={mlp: null}"], "declares rules"),
    ):
        with pytest.raises(UserError, match=message):
            plan_config(prepared(small_config, named, *words))
