"""Whose a run's folder is, and which settings a run may go on with."""

from __future__ import annotations

import pathlib

import pytest
import yaml
from meshwright.runtime.config import Config, load, parse
from meshwright.runtime.train.run_folder import RunFolder, differing_settings
from meshwright.sharding import Plan, UserError

PLAN = Plan(topology="cpu:1", mesh={"data": 1}, dims={}, params={}, batch={})


def opened(path: pathlib.Path, config: Config, steps: int = 0) -> RunFolder:
    folder = RunFolder(path)
    folder.open(config, PLAN)
    folder.metrics.write_text('{"step": 1}\n' * steps)
    return folder


def test_it_holds_the_config_and_the_plan(tmp_path: pathlib.Path) -> None:
    config = parse({}, ["train.steps=7", "rules.embed=[fsdp]"])
    folder = opened(tmp_path / "a" / "run", config)
    folder.close()
    assert load(folder.config) == config
    assert Plan.load(folder.plan) == PLAN


def test_one_run_at_a_time(tmp_path: pathlib.Path) -> None:
    first = opened(tmp_path, Config())
    with pytest.raises(UserError, match="another process is training in"):
        RunFolder(tmp_path).open(Config(), PLAN)
    first.close()
    opened(tmp_path, Config()).close()


def test_a_refused_run_leaves_the_folder_to_the_one_that_has_it(tmp_path: pathlib.Path) -> None:
    first = opened(tmp_path, parse({}, ["train.steps=7"]))
    with pytest.raises(UserError):
        RunFolder(tmp_path).open(parse({}, ["train.steps=9"]), PLAN)
    assert load(first.config).train.steps == 7
    first.close()


def test_another_config_is_refused_with_what_differs(tmp_path: pathlib.Path) -> None:
    opened(tmp_path, Config(), steps=3).close()
    folder = RunFolder(tmp_path)
    folder.check(Config())
    with pytest.raises(UserError) as caught:
        folder.check(parse({}, ["seed=4", "optimizer.learning_rate=0.5", "model.overrides.layers=2"]))
    assert (
        "(seed: 0 there, 4 now; model.overrides.layers: None there, 2 now; "
        "optimizer.learning_rate: 0.001 there, 0.5 now)" in str(caught.value)
    )
    assert "run=FOLDER" in str(caught.value)


def test_a_folder_without_a_step_belongs_to_nobody(tmp_path: pathlib.Path) -> None:
    opened(tmp_path, Config()).close()
    RunFolder(tmp_path).check(parse({}, ["seed=4"]))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(UserError, match="seed"):
        RunFolder(tmp_path).check(parse({}, ["seed=4"]))


@pytest.mark.parametrize(
    "word",
    [
        "train.steps=5",
        "mesh={data: 2}",
        "topology=cpu:2",
        "microbatches=2",
        "remat=full",
        "context=ring",
        "attention=xla",
        "experts=xla",
        "calibration=here.json",
        "model.reduced.layers=1",
        "data.segments=8",
        "rules.embed=fsdp",
        "data.prefetch=4",
        "data.read_threads=2",
        "checkpoint.keep_best=loss",
        "metrics.tensorboard=true",
        "train.sample=x",
        "profile.start_step=3",
        "hosts.timeout_seconds=9.0",
    ],
)
def test_a_run_may_go_on_with_settings_that_do_not_change_its_course(word: str) -> None:
    now = parse({}, [word])
    assert now != Config()
    assert not differing_settings(Config().model_dump(mode="json"), now.model_dump(mode="json"))


@pytest.mark.parametrize(
    "word",
    [
        "seed=1",
        "train.global_batch=8",
        "data.sequence=8",
        "data.source=elsewhere",
        "data.shuffle=false",
        "model.preset=gpt-125m",
        "optimizer.name=lion",
        "optimizer.warmup_steps=3",
    ],
)
def test_a_run_may_not_go_on_with_settings_that_do(word: str) -> None:
    key, _, value = word.partition("=")
    found = differing_settings(Config().model_dump(mode="json"), parse({}, [word]).model_dump(mode="json"))
    assert list(found) == [key]
    assert found[key][1] == yaml.safe_load(value)


def test_a_run_that_was_begun_before_there_was_a_setting_goes_on_with_its_default(
    tmp_path: pathlib.Path,
) -> None:
    folder = opened(tmp_path, Config(), steps=3)
    folder.close()
    before = yaml.safe_load(folder.config.read_text())
    del before["max_passes"], before["optimizer"]["beta2"]
    folder.config.write_text(yaml.safe_dump(before))
    folder.check(Config())
    with pytest.raises(UserError, match=r"\(max_passes: 3 there, 4 now\)"):
        folder.check(parse({}, ["max_passes=4"]))


def test_settings_that_one_side_lacks_differ() -> None:
    now = Config().model_dump(mode="json")
    before = {**now, "optimiser": {"name": "adam"}}
    assert differing_settings(before, now) == {"optimiser": ({"name": "adam"}, None)}


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_in_the_way_is_named(tmp_path: pathlib.Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        RunFolder(tmp_path / where).open(Config(), PLAN)


def test_a_config_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    opened(tmp_path, Config(), steps=1).close()
    (tmp_path / "config.yaml").write_text("mesh: {")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        RunFolder(tmp_path).check(Config())
