"""Planning a config: on the command line, in a run, and from a file."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from typing import Any

import pytest
from meshwright.runtime.config import load
from meshwright.runtime.train import plan_config, train
from meshwright.sharding import Plan, UserError, processes
from training import command, metrics
from training import meshwright as whole_command

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("compilation_cache_as_it_was")]
TINY = ("plan=auto", "topology=v5e:2x4", "data.sequence=64", "train.global_batch=16")


def meshwright(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `meshwright plan` with no devices to be had: it may not ask for any."""
    blind = os.environ | {"JAX_PLATFORMS": "none_at_all"} | environment
    return processes.run(command("plan", *words), timeout_seconds=120, env=blind)


def test_json_has_what_was_promised(small_config: pathlib.Path) -> None:
    done = meshwright(small_config, *TINY, "mesh=null", "--json", "--why", "tensor=2")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {"topology", "mesh", "specs", "estimate", "alternatives", "planning_seconds"} <= set(found)
    assert set(found["estimate"]) == {"step_seconds", "mfu", "peak_bytes", "time", "memory", "heap_bytes"}
    assert found["topology"] == "v5e:2x4"
    assert found["planning_seconds"] > 0
    assert "tensor=2" in found["why"]
    assert sum(found["estimate"]["time"].values()) == pytest.approx(found["estimate"]["step_seconds"])
    assert sum(found["estimate"]["memory"].values()) == pytest.approx(found["estimate"]["peak_bytes"])
    assert len(found["specs"]["layers/mlp/up"]) == 3
    axes = {axis for spec in found["specs"].values() for entry in spec for axis in listed(entry)}
    assert axes <= {axis for axis, size in found["mesh"].items() if size > 1}
    for row in found["alternatives"]:
        assert row["lost"]
        assert row["estimate"]["step_seconds"] > 0


def listed(entry: str | list[str] | None) -> list[str]:
    return [] if entry is None else [entry] if isinstance(entry, str) else entry


def test_the_table_keeps_to_a_narrow_terminal(small_config: pathlib.Path) -> None:
    done = meshwright(small_config, *TINY, "mesh=null", COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("v5e:2x4: ")
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout


def test_it_writes_what_it_shows(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    files = {"--save": tmp_path / "x.plan.json", "--html": tmp_path / "x.html"}
    words = [word for flag, path in files.items() for word in (flag, str(path))]
    done = meshwright(small_config, *TINY, "mesh=null", "--topology", "h100:8", "--why", "fsdp", *words)
    assert done.returncode == 0, done.stderr
    assert "fsdp=" in done.stdout
    assert "h100:8" in files["--html"].read_text()
    assert str(Plan.load(files["--save"]).topology) == "h100:8"


def test_what_fits_only_tightly_is_planned_and_said() -> None:
    """Where the places that a compiler usually leaves free take all that is left, a plan is no error."""
    roomy, tight = (
        plan_config(load(CONFIGS / "llama3-405b.yaml", ["topology=2*v6e:16x16", mesh])).plan
        for mesh in ("mesh={data: 2, fsdp: 4, tensor: 64}", "mesh={data: 2, fsdp: 64, tensor: 4}")
    )
    # A declared layout may be slower than one that only a compiler can say fits, which is another note.
    assert not any("--verify" in note and "takes it if it fits" not in note for note in roomy.notes)
    assert any("have it compiled (--verify)" in note for note in tight.notes)
    assert tight.estimate is not None
    assert tight.estimate.peak_bytes < 31.25 * 2**30


@pytest.mark.slow
def test_what_fits_only_tightly_is_taken_before_what_is_much_slower() -> None:
    """With all the usual room such rows of 405B fit over 64 parts of matrices alone, in far more seconds."""
    rows = ["topology=2*v6e:16x16", "data.sequence=12288"]
    searched, declared = (
        plan_config(load(CONFIGS / "llama3-405b.yaml", [*rows, *more])).plan
        for more in ([], ["mesh={data: 2, fsdp: 4, tensor: 64}"])
    )
    assert any("have it compiled (--verify)" in note for note in searched.notes)
    assert searched.estimate is not None
    assert declared.estimate is not None
    assert searched.estimate.step_seconds < declared.estimate.step_seconds / 1.5


def test_only_tpus_send_values_to_their_hosts() -> None:
    """XLA counts what a GPU's host holds as the GPU's, and computes layers again to make room for it."""
    tpu, gpu = (
        plan_config(load(CONFIGS / "llama3-405b.yaml", [f"topology={topology}"])).plan
        for topology in ("v5p:8x8x16", "h100:128x8")
    )
    assert "host" in tpu.saved.values()
    assert not any("host" in one.saved.values() for one in (gpu, *gpu.alternatives))


def test_what_a_config_declares_is_kept(small_config: pathlib.Path) -> None:
    words = [*TINY, "mesh={tensor: 2}", "remat=full", "microbatches=2"]
    planned = plan_config(load(small_config, words))
    made = planned.plan
    assert planned.seconds > 0
    assert made.mesh["tensor"] == 2
    assert (made.remat, made.microbatches) == ("full", 2)


INTERRUPTED = """
import signal

def at_once():
    signal.raise_signal(signal.SIGINT)

def through_a_library():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError("could not be set up") from error
"""


@pytest.mark.parametrize("function", ["at_once", "through_a_library"])
def test_an_interrupt_ends_it_without_a_word(
    small_config: pathlib.Path, tmp_path: pathlib.Path, function: str
) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    done = meshwright(small_config, "model={build: interrupted:" + function + "}", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def prepared(config: pathlib.Path, *words: str) -> Any:
    return load(config, ["topology=cpu:8", "mesh=null", "train.steps=2", "checkpoint.every=0", *words])


def test_a_primitive_without_a_rule_is_said(
    small_config: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("topology=cpu:1", "mesh=null", "model={build: small_models:mysterious}")
    planned = meshwright(small_config, *words, COLUMNS="300", PYTHONPATH=str(CONFIGS.parent / "tests"))
    assert (planned.returncode, planned.stderr) == (0, "")
    run = f"run={tmp_path / 'run'}"
    assert train(prepared(small_config, *words, "plan=declared", "train.steps=1", run)) == 0
    for said in (planned.stdout, capsys.readouterr().err):
        # A table folds its lines.
        note = " ".join(said.split()).partition("mystery has no rule")[2]
        assert "small_models.py" in note
        assert "register_op_rule" in note


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
    made = plan_config(prepared(small_config)).plan
    made.save(path)
    named = f"plan={path}"
    assert plan_config(prepared(small_config, named)).plan == made
    for words, message in (
        (["topology=v5e:2x4"], f"{path} is a plan for cpu:8, not for v5e:2x4; plan again: .* plan=auto"),
        (["train.global_batch=24"], "has shape"),
        (["mesh={data: 2}"], "the config declares data=2 and"),
        (["microbatches=4"], "the config declares microbatches=4 and"),
        (["rules={mlp: null}"], "declares rules"),
    ):
        with pytest.raises(UserError, match=message):
            plan_config(prepared(small_config, named, *words))


def test_a_saved_plan_says_that_it_needs_more_memory_than_there_is(
    small_config: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("topology=h100:8", "data.sequence=64", "train.global_batch=16", "mesh=null", "plan=auto")
    plan_config(load(small_config, words)).plan.save(saved := tmp_path / "x.plan.json")
    again = load(small_config, (*words[:-1], f"plan={saved}"))
    assert not any("may have" in note for note in plan_config(again).plan.notes)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1e-6")
    (said,) = [note for note in plan_config(again).plan.notes if "may have" in note]
    assert said.startswith("this plan needs ")
    assert said.endswith("may have 83.5 KiB here; a larger XLA_CLIENT_MEM_FRACTION gives more of it")


@pytest.mark.slow
@pytest.mark.devices(8)
def test_a_run_goes_on_by_another_plan(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ("model={build: small_models:perceptron}", "checkpoint.every=2", "mesh=null")
    made = plan_config(prepared(small_config, *words, "mesh={tensor: 4, data: 2}")).plan
    made.save(tmp_path / "x.plan.json")
    parts = tmp_path / "parts"
    plans = (("mesh={data: 8}",), ("plan=auto",), (f"plan={tmp_path / 'x.plan.json'}", "microbatches=null"))
    for number, layout in enumerate(plans, start=1):
        last = f"train.steps={2 * number}"
        assert train(prepared(small_config, *words, *layout, last, f"run={parts}")) == 0
    assert Plan.load(parts / "plan.json") == made
    whole = tmp_path / "whole"
    assert train(prepared(small_config, *words, "train.steps=6", f"run={whole}")) == 0
    losses = [[record["loss"] for record in metrics(folder)] for folder in (whole, parts)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


@pytest.mark.slow
def test_processes_search_for_one_plan(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ("plan=auto", "mesh=null", "train.steps=2", f"run={tmp_path / 'run'}", "--processes", "2")
    done = whole_command("launch", small_config, *words)
    assert done.returncode == 0, done.stdout
    assert Plan.load(tmp_path / "run" / "plan.json").estimate is not None
    assert len(metrics(tmp_path / "run")) == 2


def test_attention_is_what_the_config_says(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ("topology=v5e:2x4", "data.sequence=128", "train.global_batch=16", "mesh=null", "plan=auto")
    found = plan_config(load(small_config, words)).plan
    assert found.kernels["attention"]["implementation"] == "splash"
    assert not plan_config(load(small_config, (*words, "attention=xla"))).plan.kernels
    with pytest.raises(UserError, match="attention='cudnn' is no kernel of v5e; known for it: splash, xla"):
        plan_config(load(small_config, (*words, "attention=cudnn")))
    with pytest.raises(
        UserError, match="attention: input should be 'auto', 'xla', 'splash', 'cudnn' or 'cudnn_packed'"
    ):
        load(small_config, (*words, "attention=flash"))
    found.save(saved := tmp_path / "x.plan.json")
    with pytest.raises(UserError, match=r"declares attention=xla and .* has splash; leave one of them out"):
        plan_config(load(small_config, (*words[:-1], f"plan={saved}", "attention=xla")))


def test_context_and_experts_are_what_the_config_says(
    small_config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ("topology=v5e:2x4", "data.sequence=256", "train.global_batch=16", "mesh={context: 2, data: 4}")
    found = plan_config(load(small_config, (*words, "context=ring"))).plan
    assert found.context == "ring"
    found.save(saved := tmp_path / "x.plan.json")
    with pytest.raises(UserError, match=r"declares context=heads and .* has context=ring; leave one of them"):
        plan_config(load(small_config, (*words, f"plan={saved}", "context=heads")))
    for wrong, message in (
        ("context=rings", r"\(got 'rings'\); did you mean 'ring'\?"),
        ("experts=megablock", r"\(got 'megablock'\); did you mean 'megablox'\?"),
        ("experts=megablox", r"no call of meshwright.sharding.ops.experts; leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            plan_config(load(small_config, (*words, wrong)))
    with pytest.raises(UserError, match=r"no mesh has here: .* declare it, as mesh=\{'context': 2\}"):
        plan_config(load(small_config, (*words[:-1], "mesh=null", "plan=auto", "context=ring")))


def test_what_is_recognised_is_what_the_config_says(
    small_config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ("topology=v5e:2x4", "data.sequence=64", "train.global_batch=16", "mesh=null")
    found = plan_config(load(small_config, (*words, "plan=auto", "recognise=[attention]"))).plan
    found.save(saved := tmp_path / "x.plan.json")
    again = plan_config(load(small_config, (*words, f"plan={saved}"))).plan
    assert again.recognise == ("attention",)
    assert [note for note in again.notes if "recognise=[attention] is" in note and "plan again" in note]
    assert plan_config(load(small_config, (*words, f"plan={saved}", "recognise=[attention]"))).plan == found
    with pytest.raises(UserError, match=r"declares recognise=\[losses\] and .* has \[attention\]; leave one"):
        plan_config(load(small_config, (*words, f"plan={saved}", "recognise=[losses]")))


def test_a_batch_that_does_not_divide_is_named_as_the_config_names_it(small_config: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"^train.global_batch: a batch of 10 rows .*: 8 or 16 rows$"):
        plan_config(load(small_config, ("topology=cpu:8", "mesh={data: 8}", "train.global_batch=10")))
