"""The command line trains for real: small models, real text, simulated devices, real processes."""

import json
import subprocess
import sys

import pytest
import yaml

CONFIG = {
    "name": "small",
    "topology": "cpu:4",
    "mesh": {"data": 2, "fsdp": 2},
    "model": {
        "preset": "tiny",
        "overrides": {"layers": 2, "embed": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp": 64},
    },
    "data": {"sequence": 32},
    "train": {"steps": 6, "global_batch": 8, "evaluate_every": 3, "evaluate_batches": 1},
    "checkpoint": {"every": 3},
    "metrics": {"console": "lines", "console_every": 1},
}
KEYS = [
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "data_wait_seconds",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with text, a config and the cache that all runs of this module share."""
    home = tmp_path_factory.mktemp("home")
    text = home / "text"
    text.mkdir()
    for number in range(24):
        lines = [f"line {line} of file {number} says {line * number % 97}" for line in range(40)]
        (text / f"{number}.txt").write_text("\n".join(lines))
    config = {**CONFIG, "data": {**CONFIG["data"], "source": str(text), "cache": str(home / "tokens")}}
    (home / "config.yaml").write_text(yaml.safe_dump({**config, "compilation_cache": str(home / "compiled")}))
    return home


def meshwright(*words):
    command = [sys.executable, "-m", "meshwright.runtime.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def train(home, run, *overrides):
    result = meshwright("train", home / "config.yaml", f"run={run}", *overrides)
    assert result.returncode == 0, result.stderr
    return result


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [record["loss"] for record in metrics(run)]


@pytest.fixture(scope="module")
def reference(home):
    run = home / "reference"
    train(home, run)
    return run


def test_a_run_folder_holds_all_there_is_to_know(reference):
    records = metrics(reference)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(key in record for record in records for key in KEYS)
    assert ["eval_loss" in record for record in records] == [False, False, True, False, False, True]
    assert records[-1]["loss"] < records[0]["loss"]
    assert yaml.safe_load((reference / "config.yaml").read_text())["train"]["steps"] == 6
    assert json.loads((reference / "plan.json").read_text())["mesh"] == {"data": 2, "fsdp": 2}
    assert sorted(path.name for path in (reference / "checkpoints").iterdir() if path.name.isdigit()) == [
        "3",
        "6",
    ]


def test_the_layout_does_not_change_what_is_learnt(home, reference, tmp_path):
    run = tmp_path / "run"
    train(home, run, "topology=cpu:8", "mesh={data: 1, fsdp: 4, tensor: 2}", "remat=full", "microbatches=2")
    assert losses(run) == pytest.approx(losses(reference), rel=1e-4)


def test_two_processes_learn_what_one_does(home, reference, tmp_path):
    run = tmp_path / "run"
    result = meshwright("launch", home / "config.yaml", f"run={run}", "--processes", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(run) == pytest.approx(losses(reference), rel=1e-4)


def test_the_same_command_goes_on_and_then_has_nothing_to_do(home, tmp_path):
    run = tmp_path / "run"
    train(home, run, "optimizer.schedule=constant", "train.steps=3")
    onward = train(home, run, "optimizer.schedule=constant", "mesh={data: 4}")
    assert "going on from step 3" in onward.stderr
    whole = tmp_path / "whole"
    train(home, whole, "optimizer.schedule=constant")
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    again = train(home, run, "optimizer.schedule=constant")
    assert "nothing left to do" in again.stderr
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_another_config_is_refused_with_what_differs(home, reference):
    result = meshwright(
        "train", home / "config.yaml", f"run={reference}", "optimizer.learning_rate=0.5", "seed=3"
    )
    assert result.returncode == 2
    assert "seed: 0 there, 3 now; optimizer.learning_rate: 0.001 there, 0.5 now" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(home, reference, tmp_path, damage):
    run = tmp_path / "run"
    train(home, run)
    newest = run / "checkpoints" / "6"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    file.write_bytes(content)
    result = train(home, run)
    assert "checkpoint at step 6 is damaged" in result.stderr
    assert "going on from step 3" in result.stderr
    assert losses(run) == pytest.approx(losses(reference), rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_unsaved(home, tmp_path):
    run = tmp_path / "run"
    words = ("optimizer.learning_rate=1e30", "optimizer.clip_norm=null", "checkpoint.every=1")
    result = meshwright("train", home / "config.yaml", f"run={run}", *words)
    assert result.returncode == 1
    assert "error: the loss of step" in result.stderr
    assert "Traceback" not in result.stderr
    saved = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(saved, default=0) <= len(metrics(run))


def test_a_profile_is_captured_and_read(home, tmp_path):
    run = tmp_path / "run"
    train(home, run, "profile.start_step=4", "profile.num_steps=2", "metrics.tensorboard=true")
    found = meshwright("profile", run, "--json")
    assert found.returncode == 0, found.stderr
    record = json.loads(found.stdout)
    assert len(record["steps"]) >= 2
    assert list((run / "tensorboard").glob("events*"))
    listed = meshwright("checkpoint", run, "--verify", "--json")
    assert [row["step"] for row in json.loads(listed.stdout)] == [3, 6]
    assert not any(row["fault"] for row in json.loads(listed.stdout))
