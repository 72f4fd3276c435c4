"""What a run may be told without changing what it learns, and what it may be told to change that."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from meshwright.runtime.config import load
from meshwright.runtime.train import train
from meshwright.sharding import UserError
from training import metrics, saved_steps

PERCEPTRON = ("model={build: small_models:perceptron}", "optimizer.learning_rate=0.02")
pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("compilation_cache_as_it_was")]
# Losses and gradient norms are sums in another order from one layout to the next.
SAME = 2e-5


def run(config: pathlib.Path, folder: pathlib.Path, *words: str) -> list[dict[str, Any]]:
    """Train in this process and return the records of its steps."""
    assert train(load(config, [*words, f"run={folder}"])) == 0
    return metrics(folder)


def column(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if key in record]


@pytest.mark.devices(8)
def test_no_layout_changes_what_a_run_learns(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = (*PERCEPTRON, "train.steps=4", "train.evaluate_every=2", "checkpoint.every=0", "topology=cpu:8")
    layouts = [
        ("mesh={data: 8}",),
        ("mesh={data: 2, fsdp: 2, tensor: 2}", "microbatches=2"),
        ("mesh={fsdp: 2, tensor: -1}", "microbatches=4", "rules={vocab: fsdp, embed: null}"),
    ]
    found = [run(small_config, tmp_path / str(n), *words, *layout) for n, layout in enumerate(layouts)]
    assert column(found[0], "loss")[-1] < column(found[0], "loss")[0]
    assert [record["step"] for record in found[0] if "eval_loss" in record] == [2, 4]
    for records in found[1:]:
        for key in ("loss", "grad_norm", "eval_loss", "learning_rate"):
            assert column(records, key) == pytest.approx(column(found[0], key), rel=SAME), key


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    "name",
    ["muon", pytest.param("adafactor", marks=pytest.mark.slow), pytest.param("lion", marks=pytest.mark.slow)],
)
def test_each_optimiser_learns_and_goes_on(
    small_config: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    words = (*PERCEPTRON, f"optimizer.name={name}", "checkpoint.every=0", "mesh={fsdp: 2, tensor: 2}")
    whole = run(small_config, tmp_path / "whole", *words, "train.steps=10")
    assert column(whole, "loss")[-1] < column(whole, "loss")[0] - 0.02
    run(small_config, tmp_path / "parts", *words, "train.steps=5")
    parts = run(small_config, tmp_path / "parts", *words, "train.steps=10")
    for key in ("loss", "grad_norm"):
        assert column(parts, key) == pytest.approx(column(whole, key), rel=1e-6)


@pytest.mark.devices(4)
def test_a_run_ends_with_a_sample(
    small_config: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train.steps=2", "checkpoint.every=0", 'train.sample="line "', "train.sample_tokens=40")
    run(small_config, tmp_path, *words)
    head, found, tail = capsys.readouterr().out.partition("\n--- a sample of 40 tokens ---\nline ")
    assert not head
    assert found
    assert tail.endswith("\n---\n")
    # What so young a model writes is any bytes, some of which a terminal would take for commands.
    assert all(char.isprintable() or char in "\n\t" for char in tail)


@pytest.mark.slow
@pytest.mark.devices(4)
def test_computing_in_bfloat16_learns_what_float32_does(
    small_config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ("train.steps=8", "checkpoint.every=0")
    low = run(small_config, tmp_path / "low", *words, "model.overrides.compute_dtype=bfloat16")
    full = run(small_config, tmp_path / "full", *words)
    assert column(low, "loss") == pytest.approx(column(full, "loss"), rel=0.01)
    assert column(low, "loss") != column(full, "loss")


@pytest.mark.devices(4)
def test_the_checkpoints_that_a_config_keeps(small_config: pathlib.Path, tmp_path: pathlib.Path) -> None:
    # A rate so large that the loss rises again, so that the best step is not the last.
    words = (*PERCEPTRON, "optimizer.learning_rate=2.0", "train.steps=9", "checkpoint.every=1")
    kept = ("checkpoint.keep_last=2", "checkpoint.keep_every=4", "checkpoint.keep_best=loss")
    folder = tmp_path / "loss"
    losses = column(run(small_config, folder, *words, *kept), "loss")
    best = losses.index(min(losses)) + 1
    assert best < 8
    assert saved_steps(folder) == sorted({best, 4, 8, 9})
    # Only every third step is evaluated: no other can be the best.
    kept = ("checkpoint.keep_last=1", "checkpoint.keep_best=eval_loss", "train.evaluate_every=3")
    folder = tmp_path / "eval"
    records = run(small_config, folder, *words, *kept)
    measured = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert list(measured) == [3, 6, 9]
    assert saved_steps(folder) == sorted({min(measured, key=measured.__getitem__), 9})


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*PERCEPTRON, "train.sample=x"), "train.sample='x': this model has no decode function"),
        (("train.sample=''",), "train.sample is empty"),
        (
            (
                "model.overrides={position_embedding: learned, max_sequence: 40, layers: 1}",
                "train.sample=four",
                "train.sample_tokens=40",
            ),
            "max_new_tokens=40 exceed max_sequence=40; at most 36 can be added",
        ),
        (("train.evaluate_every=2", "data.holdout=0"), "holdout"),
        ((*PERCEPTRON, "remat=full"), "remat='full' works on scanned layers"),
        (("checkpoint.keep_best=eval_loss",), "never measured with train.evaluate_every=0"),
        (("checkpoint.best_mode=max",), "best_mode='max' has no effect without keep_best"),
        (("optimizer.schedule=wsd", "optimizer.decay_steps=90"), "decay_steps=90 does not fit"),
    ],
)
def test_what_a_run_could_not_do_in_the_end_is_refused_at_the_start(
    small_config: pathlib.Path, tmp_path: pathlib.Path, words: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        run(small_config, tmp_path / "run", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
