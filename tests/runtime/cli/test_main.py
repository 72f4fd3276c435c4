"""A user's mistake is one sentence on stderr and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
from forks import forked
from meshwright.runtime.config import load
from meshwright.runtime.data import open_corpus
from training import write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistake:
    """What is typed after `command`, and words that its sentence has to hold.

    `{home}` stands for the folder of text and configs, `{run}` for the run folder.
    """

    words: tuple[str, ...]
    says: tuple[str, ...]
    command: tuple[str, ...] = ("train", "{home}/config.yaml", "run={run}")
    missing: str | None = None


# What a plan of the small config is asked for: devices that are not here, with nothing declared.
PLAN = ("plan", "{home}/config.yaml", "plan=auto", "topology=v5e:2x4", "mesh=null", "train.global_batch=16")


def override(*words: str, says: str | tuple[str, ...], missing: str | None = None) -> Mistake:
    return Mistake(words=words, says=(says,) if isinstance(says, str) else says, missing=missing)


def planned(*words: str, says: str | tuple[str, ...]) -> Mistake:
    return typed(*PLAN, *words, says=says)


def typed(*words: str, says: str | tuple[str, ...]) -> Mistake:
    return Mistake(command=words, words=(), says=(says,) if isinstance(says, str) else says)


MISTAKES = {
    "unknown section": override("trian.steps=3", says=("trian", "'train'")),
    "unknown key": override("train.stepps=3", says=("train.stepps", "'train.steps'")),
    "key of another section": override("train.learning_rate=1", says="'optimizer.learning_rate'"),
    "word for a number": override("train.steps=many", says=("train.steps", "'many'")),
    "value for a section": override("train=3", says="train is a section"),
    "no equals sign": override("train.steps", says="section.key=value"),
    "value that is not YAML": override("mesh={data: 2", says="not YAML"),
    "no steps": override("train.steps=0", says=("train.steps", "0")),
    "metric that is not kept": override("checkpoint.keep_best=accuracy", says=("accuracy", "eval_loss")),
    "window too long": override("profile.num_steps=50", says=("num_steps=50", "nearest: 20")),
    "top of what is not compiled": planned(
        "--top", "3", says="--top 3 chooses among compiled plans; add --verify"
    ),
    "quick without a proof": planned("--quick", says="--quick is a way to verify; add --verify"),
    "no config file": typed("train", "{home}/confg.yaml", says=("confg.yaml", "'config.yaml'")),
    "config that is not YAML": typed("train", "{home}/broken.yaml", says="broken.yaml is not YAML"),
    "config that is a list": typed("train", "{home}/list.yaml", says="not a mapping"),
    "config file of a launch": typed("launch", "{home}/confg.yaml", "--processes", "2", says="'config.yaml'"),
    "unknown preset": override("model={preset: llama3-8}", says=("llama3-8", "llama3-8b")),
    "unknown model field": override("model.overrides.layer=2", says=("layer", "layers")),
    "heads that do not group": override("model.overrides={heads: 6, kv_heads: 4}", says=("heads", "6", "4")),
    "no such module": override("model={build: nowhere_at_all:make}", says="nowhere_at_all"),
    "no such function": override("model={build: json:dumpz}", says=("dumpz", "did you mean")),
    "fewer ids than the text": override(
        "model={build: own_model:narrow}", "mesh={data: -1}", says=("up to 2", "vocab is 99", "fits is 259")
    ),
    "not a model": override("model={build: json:loads, arguments: {s: '1'}}", says=("int", "Model")),
    "wrong arguments": override("model={build: json:loads, arguments: {words: 1}}", says="json:loads"),
    "preset and build": override("model={preset: tiny, build: json:loads}", says="not both"),
    "devices that the mesh does not fill": override("mesh={data: 3}", says=("3", "4")),
    "mesh larger than the machine": override("mesh={data: 4, fsdp: 2}", says=("8", "4")),
    "two axes that take the rest": override("mesh={data: -1, fsdp: -1}", says="-1"),
    "unknown axis": override("mesh={dta: 2, fsdp: 2}", says=("dta", "data")),
    "axis that does nothing": override("mesh={data: 2, expert: 2}", says="expert=2"),
    "more stages than layers": override("mesh={stage: 4}", says=("stage=4", "layers=2")),
    "heads that the axis does not divide": override(
        "rules={heads: tensor}",
        "mesh={tensor: 4}",
        "model.overrides={heads: 6, kv_heads: 6}",
        says=("tensor=4", "heads=6"),
    ),
    "axis used twice": override("rules={'embedding/*': [fsdp, fsdp]}", says="fsdp"),
    "rule that matches nothing": override("rules={'*/nothing': [fsdp]}", says="*/nothing"),
    "unknown axis in a rule": override("rules={embed: fdsp}", says=("fdsp", "fsdp")),
    "topology that is not one": override("topology=v5q:2x2x2", says=("v5q", "v5p")),
    "devices that are not here": override(
        "topology=v5p:4x4x4", "mesh={data: -1}", "train.global_batch=64", says="v5p:4x4x4"
    ),
    "batch that does not divide": override("train.global_batch=6", says=("6", "4")),
    "microbatches that do not divide": override("microbatches=3", says=("3", "8")),
    "no such text": override("data.source={home}/txt", says="{home}/txt"),
    "empty folder": override("data.source={home}/empty", says="{home}/empty"),
    "no such tokenizer": override("data.tokenizer={home}/tokenizer.json", says="tokenizer.json"),
    "tokenizer that is not one": override("data.tokenizer={home}/list.json", says="list.json"),
    "rows longer than the text": override("data.sequence=1000000", says="sequence=1000000"),
    "vocabulary too small": override("model.overrides.vocab=100", says=("100", "259")),
    "run folder that is a file": Mistake(
        command=("train", "{home}/config.yaml"), words=("run={home}/config.yaml",), says=("config.yaml",)
    ),
    "run folder under a file": Mistake(
        command=("train", "{home}/config.yaml"), words=("run={home}/config.yaml/run",), says=("config.yaml",)
    ),
    "TensorBoard that is not installed": override(
        "metrics.tensorboard=true", says=("tensorboard", "install"), missing="tensorboardX"
    ),
    "no processes": typed(
        "launch", "{home}/config.yaml", "--processes", "0", says=("--processes 0", "nearest: 1")
    ),
    "training on an unknown chip": typed(
        "train", "{home}/config.yaml", "--topology", "v5q:2x2", says="did you mean 'v5p'"
    ),
    "plan of no config": typed("plan", "{home}/confg.yaml", says="'config.yaml'"),
    "plan for an unknown chip": planned("--topology", "v5q:2x2", says="did you mean 'v5p'"),
    "plan for a slice that is not made": planned("--topology", "v5p:4x4x9", says="nearest: v5p:4x4x8"),
    "why of nothing there": planned("plan=auto", "--why", "tensr", says="did you mean 'tensor'"),
    "plan saved nowhere": planned("--save", "{home}/no/x.json", says="{home}/no/x.json cannot be written"),
    "page written to a folder": planned("--html", "{home}/text", says="{home}/text cannot be written: Is a"),
    "plan file that is missing": planned("plan={home}/x.json", says="no plan file {home}/x.json"),
    "plan that is a word misspelt": planned("plan=autoo", says="no plan file autoo; did you mean 'auto'"),
    "plan file misspelt": planned("plan={home}/smal.plan.json", says="did you mean '{home}/small.plan.json'"),
    "plan for devices that the config's mesh does not fill": typed(
        "plan",
        "{home}/config.yaml",
        "mesh={data: 2, fsdp: 2}",
        "--topology",
        "v5p:4x4x8",
        says=("data=2 x fsdp=2 is 4, but there are 128", "plan=auto mesh=null"),
    ),
    "plan file that is none": planned("plan={home}/list.json", says="{home}/list.json"),
    "plan on an axis that does not divide": planned(
        "plan=auto", "mesh={tensor: 3}", says="nearest: tensor=2 or 4"
    ),
    "plan on an unknown axis": planned("mesh={tensr: 2}", says="did you mean 'tensor'"),
    "plan with a rule for nothing": planned("rules={embd: fsdp}", says="did you mean 'embed'"),
    "plan in parts that do not divide": planned(
        "microbatches=5", says="does not divide the batch of 16 rows"
    ),
    "plan that does not fit": planned(
        "plan=auto",
        "model={preset: llama3-70b}",
        "topology=v5e:4x4",
        says=("nothing fits v5e:4x4", "too much", "fits:"),
    ),
    "profile of no folder": typed("profile", "{home}/nowhere", says="{home}/nowhere"),
    "profile of a run without one": typed("profile", "{home}/text", says="profile"),
    "checkpoints of no folder": typed("checkpoint", "{home}/nowhere", says="{home}/nowhere"),
    "config in a folder of hidden files": typed("config", "{home}/hidden/x.yaml", says="; there are none"),
    "config of no file": typed("config", "{home}/confg.yaml", says="'config.yaml'"),
}

OWN_MODEL = """
import dataclasses
from meshwright.models import mlp
from meshwright.models.perceptron import MlpConfig


def narrow():
    return dataclasses.replace(mlp(MlpConfig(vocab=99)), config=None)
"""

# All mistakes are made in one process, since a process for each would spend its time importing JAX.
CHILD = """
import contextlib, io, json, sys, traceback
from meshwright.runtime.cli.main import main

for words, missing in json.load(sys.stdin):
    sys.argv = ["meshwright", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    kept = sys.modules.get(missing)
    if missing:
        sys.modules[missing] = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    if missing:
        del sys.modules[missing]
        if kept is not None:
            sys.modules[missing] = kept
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def home(small_config: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    home = tmp_path_factory.mktemp("mistakes")
    write_text(home / "text")
    (home / "config.yaml").write_text(small_config.read_text())
    # What is left to say of the text itself has been said.
    open_corpus(load(home / "config.yaml").data, lambda _: None)
    (home / "broken.yaml").write_text("mesh: {data: 2\ntrain: ]\n")
    (home / "list.yaml").write_text("- data\n- train\n")
    (home / "list.json").write_text("[1, 2]\n")
    (home / "small.plan.json").write_text("{}\n")
    (home / "empty").mkdir()
    (home / "hidden").mkdir()
    (home / "hidden/.hidden.yaml").write_text("")
    (home / "own_model.py").write_text(OWN_MODEL)
    return home


def fill(word: str, home: pathlib.Path, name: str) -> str:
    return word.replace("{home}", str(home)).replace("{run}", str(run_folder(home, name)))


def run_folder(home: pathlib.Path, name: str) -> pathlib.Path:
    return home / "runs" / name.replace(" ", "-")


@pytest.fixture(scope="module")
def outcomes(home: pathlib.Path) -> dict[str, tuple[int, str, str]]:
    """Mistake → exit code, stdout and stderr."""
    cases = [
        ([fill(word, home, name) for word in (*mistake.command, *mistake.words)], mistake.missing)
        for name, mistake in MISTAKES.items()
    ]
    child = subprocess.run(
        forked([sys.executable, "-c", CHILD]),
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=home,
    )
    lines = child.stdout.splitlines()
    assert len(lines) == len(MISTAKES), child.stderr
    return {name: tuple(json.loads(line)) for name, line in zip(MISTAKES, lines, strict=True)}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    name: str, home: pathlib.Path, outcomes: dict[str, tuple[int, str, str]]
) -> None:
    code, out, err = outcomes[name]
    assert code == 2, err
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    for words in MISTAKES[name].says:
        assert fill(words, home, name) in line
    assert not run_folder(home, name).exists()
