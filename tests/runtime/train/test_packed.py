"""Which attention a config's packed rows are planned with, and what a run makes of them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from meshwright.runtime.config import load
from meshwright.runtime.doctor import kernels as doctor
from meshwright.runtime.train import job, plan_config
from meshwright.runtime.train.job import checked_segments
from meshwright.sharding import Plan, UserError

CONFIG = pathlib.Path(__file__).parents[3] / "configs" / "llama3-8b.yaml"
SMALL = ("model.overrides.layers=2", "train.global_batch=16", "topology=null", "plan=auto", "mesh=null")


def kernels(*overrides: str) -> Any:
    return plan_config(load(CONFIG, [*SMALL, *overrides]), "h100:1x8").plan.kernels["attention"]


@pytest.fixture
def found_right(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Have a GPU here, which `meshwright doctor --kernels` found right with two kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "_here", lambda: "a GPU")
    monkeypatch.setattr(doctor, "attached_accelerators", lambda: ["gpu"])
    (tmp_path / "meshwright").mkdir()
    found = {"a GPU": {"cudnn": True, "cudnn_packed": True}, "another": {"splash": True}}
    (tmp_path / "meshwright" / "kernels.json").write_text(json.dumps(found))


def test_a_kernel_that_was_never_compared_is_taken_by_name_only() -> None:
    assert kernels("data.segments=40") == {"implementation": "cudnn"}
    packed = {"implementation": "cudnn_packed", "segments": 40}
    assert kernels("data.segments=40", "attention=cudnn_packed") == packed
    with pytest.raises(UserError, match="how many segments a row has at most is not known"):
        kernels("attention=cudnn_packed", "data.source=/nowhere")


@pytest.mark.usefixtures("found_right")
def test_once_it_was_found_right_it_is_the_default() -> None:
    assert kernels("data.segments=40") == {"implementation": "cudnn_packed", "segments": 40}
    assert kernels("data.segments=40", "attention=cudnn") == {"implementation": "cudnn"}
    assert kernels("data.segments=40", "data.packing=false") == {"implementation": "cudnn"}
    assert doctor.compared() == ("cudnn", "cudnn_packed")


def test_rows_of_one_document_ask_for_no_mask() -> None:
    names = {"tokens", "targets", "positions"}
    assert set(plan_config(load(CONFIG, [*SMALL, "data.packing=false"]), "h100:1x8").plan.batch) == names


def test_a_text_of_more_segments_than_the_plan_takes_is_refused(tmp_path: pathlib.Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(64):
        (text / f"{number}.txt").write_text("a few words")
    config = load(CONFIG, [*SMALL, f"data.source={text}", f"data.cache={tmp_path}", "data.sequence=256"])
    data = job.open_data(config.data, 0, 1)
    plan = Plan(topology="h100:1x8", mesh={}, dims={}, params={}, batch={})
    packed = {"attention": {"implementation": "cudnn_packed", "segments": 4}}
    assert checked_segments(data, config, plan) is data
    with pytest.raises(UserError, match=r"has \d\d segments and the plan's attention takes 4"):
        checked_segments(data, config, plan.__class__(**{**vars(plan), "kernels": packed}))
