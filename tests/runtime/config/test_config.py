"""Settings from a file and from words, what they come back as, and one sentence for each mistake."""

from __future__ import annotations

import pathlib

import pytest
import yaml
from meshwright.runtime.config import Config, describe_settings, dump, fields, load, parse
from meshwright.sharding import UserError

QUICKSTART = pathlib.Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_words_are_laid_over_the_file_and_the_file_over_the_defaults(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, "seed: 3\ntrain: {steps: 7, global_batch: 4}\nmesh: {data: 2, tensor: 4}\n")
    config = load(path, ["train.steps=9", "data.sequence=64", "mesh.data=1", "rules.embed=[fsdp, tensor]"])
    assert (config.seed, config.train.steps, config.train.global_batch) == (3, 9, 4)
    assert config.mesh == {"data": 1, "tensor": 4}
    assert config.rules == {"embed": ["fsdp", "tensor"]}
    assert config.data.sequence == 64
    assert config.optimizer == Config().optimizer


def test_an_empty_file_is_all_defaults(tmp_path: pathlib.Path) -> None:
    assert load(write(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("optimizer.learning_rate=3E-4", "optimizer.learning_rate", 3e-4),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("checkpoint.keep_last=null", "checkpoint.keep_last", None),
        ("train.sample=x = 1", "train.sample", "x = 1"),
        ('train.sample="a: b"', "train.sample", "a: b"),
        ("train.stop_on_nan=false", "train.stop_on_nan", False),
        ("model.overrides.layers=2", "model.overrides", {"layers": 2}),
        ("data.include=*.md", "data.include", "*.md"),
    ],
)
def test_a_word_is_yaml(word: str, key: str, value: object) -> None:
    found = parse({}, [word]).model_dump()
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


def test_the_run_folder_takes_the_runs_name() -> None:
    assert parse({"name": "mine"}).run_folder == pathlib.Path("runs/mine")
    assert parse({"name": "mine", "run": "/x/{name}-{name}"}).run_folder == pathlib.Path("/x/mine-mine")


def test_what_is_written_is_read_back(tmp_path: pathlib.Path) -> None:
    for config in (Config(), load(QUICKSTART, ["rules.embed=[fsdp, null]", "optimizer.learning_rate=1e-7"])):
        assert load(write(tmp_path, dump(config))) == config


def test_every_setting_is_described_by_a_line_that_sets_its_default() -> None:
    described = describe_settings().splitlines()
    words = [line for line in described if line and not line.startswith((" ", "#"))]
    assert [word.partition("=")[0] for word in words] == [key for key, *_ in fields()]
    assert parse({}, words) == Config()
    assert all(description.strip() for *_, description in fields())
    assert {word.split(".")[0] for word in words if "." in word} >= {"model", "data", "train", "optimizer"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian.steps=3"], "there is no setting trian; did you mean 'train'?"),
        (["train.step=3"], "there is no setting train.step; did you mean 'train.steps'?"),
        (["steps=3"], "did you mean 'train.steps'"),
        (["train.keep_last=3"], "did you mean 'checkpoint.keep_last'"),
        (["train.steps"], "'train.steps' is not of the form section.key=value"),
        (["=3"], "'=3' is not of the form section.key=value"),
        (["train=5"], r"train is a section \(steps, .*\); got 5"),
        (["train=null"], "section train is empty"),
        (["seed.x=1", "seed=3", "seed.y=2"], "seed is a value, not a section"),
        (["mesh={data: 2"], "the value in 'mesh={data: 2' is not YAML"),
        (["mesh={data: 2, data: 4}"], "'data' stands twice"),
        (["train.steps=0"], r"train.steps: .* greater than or equal to 1 \(got 0\)"),
        (["train.steps=2.5"], r"train.steps: .* integer \(got 2.5\)"),
        (["train.steps=true"], r"train.steps: .* integer \(got True\)"),
        (["train.steps='5'"], r"train.steps: .* integer \(got '5'\)"),
        (["mesh={data: many}"], r"mesh.data: .* integer \(got 'many'\)"),
        (["profile.num_steps=true"], r"profile.num_steps: .* integer \(got True\)"),
        (["optimizer.learning_rate=.inf"], r"optimizer.learning_rate: .* finite number \(got inf\)"),
        (["optimizer.learning_rate=-1"], r"greater than 0 \(got -1\)"),
        (["train.stop_on_nan=3"], r"train.stop_on_nan: .* boolean \(got 3\)"),
        (["remat=dot"], r"remat: .*'none', 'dots' or 'full' \(got 'dot'\)"),
        (["rules={embed: 3}"], r"rules.embed: .*\(got 3\)"),
        (["name=a b"], r"name: .*\(got 'a b'\)"),
        (["train.steps=0", "seed=-1"], "; and 1 more$"),
        (["model={preset: tiny, build: a:b}"], "give preset='tiny' or build='a:b', not both"),
        (["model={preset: null}"], "give a preset or a build function"),
        (["model.build=nothing"], "build='nothing' is not of the form module:function"),
        (["model.arguments={embed: 8}"], r"arguments={'embed': 8} are for build, which is not given"),
        (["model={preset: null, build: a:b, overrides: {layers: 2}}"], "build takes arguments"),
        (["checkpoint.keep_best=accuracy"], "keep_best='accuracy' is not a metric .* loss, eval_loss"),
        (["hosts.process_id=1"], "process_id=1 needs num_processes too"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        parse({}, words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mesh: {data: 2\n", "config.yaml is not YAML"),
        ("- a\n- b\n", "holds list, not a mapping"),
        ("train:\n", "section train is empty"),
        ("seed: 1\ntrain: {steps: 2}\nseed: 2\n", "'seed' stands twice .*line 3"),
        ("name: !!python/object/apply:os.getcwd []\n", "is not YAML: could not determine a constructor"),
        ("? [a, b]\n: 3\n", "config.yaml"),
        ("a: " + "[" * 2000, "nested too deeply"),
        ("name: \xff\n".encode("latin-1"), "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    tmp_path: pathlib.Path, text: str | bytes, sentence: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=sentence) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_the_nearest_that_is_there(tmp_path: pathlib.Path) -> None:
    write(tmp_path, "")
    with pytest.raises(UserError, match=r"no config file .*confg\.yaml; did you mean 'config\.yaml'"):
        load(tmp_path / "confg.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_the_quickstart_says_what_it_resolves_to() -> None:
    resolved = yaml.safe_load(dump(load(QUICKSTART)))
    assert resolved["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert resolved["topology"] == "cpu:8"
