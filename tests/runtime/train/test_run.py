"""The command line trains for real: small models, real text, simulated devices, real processes."""

import json
import pathlib
import re
import shutil

import pytest
import yaml
from training import meshwright, metrics, saved_steps

pytestmark = pytest.mark.numerics

KEYS = [
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "data_wait_seconds",
]
FROZEN = pathlib.Path(__file__).parents[2] / "frozen" / "losses.json"
SETTINGS = ["train.steps=6", "train.evaluate_every=3", "train.evaluate_batches=1", "checkpoint.every=3"]


def words(config, run, *overrides):
    return (config, *SETTINGS, f"run={run}", *overrides)


def train(config, run, *overrides):
    result = meshwright("train", *words(config, run, *overrides))
    assert result.returncode == 0, result.stderr
    return result


def losses(run):
    return [record["loss"] for record in metrics(run)]


@pytest.fixture(scope="module")
def reference(small_config, tmp_path_factory):
    run = tmp_path_factory.mktemp("reference") / "run"
    train(small_config, run)
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


def test_it_learns_what_it_always_did(reference):
    frozen = json.loads(FROZEN.read_text())
    # Sums in another order, on another processor, move a loss by far less.
    assert losses(reference)[: len(frozen)] == pytest.approx(frozen[: len(losses(reference))], rel=1e-3)


@pytest.mark.slow
def test_the_layout_does_not_change_what_is_learnt(small_config, reference, tmp_path):
    run = tmp_path / "run"
    result = train(
        small_config,
        run,
        "topology=cpu:8",
        "mesh={data: 1, fsdp: 4, tensor: 2}",
        "remat=full",
        "microbatches=2",
    )
    assert "accumulation was checked on 8 rows in " in result.stderr
    assert losses(run) == pytest.approx(losses(reference), rel=1e-4)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(small_config, reference, tmp_path):
    run = tmp_path / "run"
    result = meshwright("launch", *words(small_config, run, "microbatches=2"), "--processes", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "accumulation was checked on 8 rows in " in result.stdout + result.stderr
    assert losses(run) == pytest.approx(losses(reference), rel=1e-4)


def test_the_same_command_goes_on_and_then_has_nothing_to_do(small_config, reference, tmp_path):
    run = tmp_path / "run"
    train(small_config, run, "train.steps=3")
    onward = train(small_config, run)
    assert "going on from step 3" in onward.stderr
    assert losses(run) == pytest.approx(losses(reference), rel=1e-4)
    again = train(small_config, run)
    assert "nothing left to do" in again.stderr
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_another_config_is_refused_with_what_differs(small_config, reference):
    changed = ("optimizer.learning_rate=0.5", "seed=3")
    result = meshwright("train", *words(small_config, reference, *changed))
    assert result.returncode == 2
    assert "seed: 0 there, 3 now; optimizer.learning_rate: 0.001 there, 0.5 now" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("damage", ["flip", pytest.param("truncate", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(small_config, reference, tmp_path, damage):
    run = shutil.copytree(reference, tmp_path / "run")
    newest = run / "checkpoints" / "6"
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    file.write_bytes(content)
    result = train(small_config, run)
    assert "checkpoint at step 6 is damaged" in result.stderr
    assert "going on from step 3" in result.stderr
    assert losses(run) == pytest.approx(losses(reference), rel=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run_unsaved(small_config, tmp_path):
    run = tmp_path / "run"
    wild = ("optimizer.learning_rate=1e30", "optimizer.clip_norm=null", "checkpoint.every=1")
    result = meshwright("train", *words(small_config, run, *wild))
    assert result.returncode == 1
    assert "error: the loss of step" in result.stderr
    assert "nothing of that step is kept" in result.stderr
    assert re.search(r"step \d+: the first value that is not finite is in ", result.stderr)
    assert "Traceback" not in result.stderr
    assert max(saved_steps(run), default=0) <= len(metrics(run))


@pytest.mark.numerics(False)
def test_a_profile_is_captured_and_read(small_config, tmp_path):
    run = tmp_path / "run"
    train(small_config, run, "profile.start_step=4", "profile.num_steps=2", "metrics.tensorboard=true")
    found = meshwright("profile", run, "--json")
    assert found.returncode == 0, found.stderr
    record = json.loads(found.stdout)
    assert len(record["steps"]) >= 2
    assert list((run / "tensorboard").glob("events*"))
    listed = meshwright("checkpoint", run, "--verify", "--json")
    assert [row["step"] for row in json.loads(listed.stdout)] == [3, 6]
    assert not any(row["fault"] for row in json.loads(listed.stdout))
