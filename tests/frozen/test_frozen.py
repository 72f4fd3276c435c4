"""Every shipped config is planned as it was: decisions exactly, figures to the last digits of a sum."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest
from frozen.write import CONFIGS, HERE, SHIPPED, cases, frozen, hashed, planned, shipped
from meshwright.runtime.config import load
from meshwright.runtime.train import optimizer
from meshwright.runtime.train.job import build_model
from meshwright.runtime.train.planning import Shapes, plan_config, plan_of

AGAIN = "if this is meant, run `python tests/frozen/write.py` and say in CHANGELOG.md what changed and why"
# Sums of floats may differ in their last digits from one processor to the next.
SAME = 1e-9


def test_every_case_and_no_other_is_kept() -> None:
    kept = {path.stem for path in HERE.glob("*.json")} - {SHIPPED.stem, "losses"}
    assert kept == set(cases()), AGAIN


@pytest.mark.parametrize("case", cases())
def test_a_config_is_planned_as_it_was(case: str) -> None:
    was = json.loads((HERE / f"{case}.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(frozen(planned(case))))
    assert not differences(was, now), AGAIN
    estimate = planned(case).estimate
    assert estimate is not None
    assert 0.02 < estimate.mfu < 1.0
    assert planned(case).origin is not None


@pytest.mark.parametrize(
    "name",
    [
        # The longest to plan; Mixtral's is a mixture too, and 70B's tokens lie over context.
        pytest.param(name, marks=pytest.mark.slow if name in ("deepseek-v3", "llama3-8b-1m") else ())
        for name in sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    ],
)
def test_a_config_shows_what_it_trains(name: str) -> None:
    config = load(CONFIGS / f"{name}.yaml")
    # The quickstart's case is what is searched for, not what its config declares.
    shown = plan_config(config).plan if name == "quickstart" else planned(name)
    model = build_model(config.model)
    update = optimizer.build(
        config.optimizer, optimizer.schedule(config.optimizer, config.train.steps), model.names
    )
    trained = plan_of(config, Shapes.of(config, model), shown.topology, update)
    assert shown.decision() == trained.decision()
    assert shown.estimate == trained.estimate


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_a_shipped_plan_decides_what_it_did(path: pathlib.Path) -> None:
    assert hashed(path) == json.loads(SHIPPED.read_text())[path.name], AGAIN


def test_a_figure_that_moves_is_seen_and_the_rounding_of_a_sum_is_not() -> None:
    was = {"estimate": {"step_seconds": 2.0}, "decided": {"mesh": {"data": 2}}}
    assert not differences(was, {"estimate": {"step_seconds": 2.0 + 1e-12}, "decided": {"mesh": {"data": 2}}})
    moved = {"estimate": {"step_seconds": 2.00001}, "decided": {"mesh": {"data": 4}, "remat": "full"}}
    assert differences(was, moved) == [
        "decided/mesh/data: 2 before, 4 now",
        "decided/remat: absent before, 'full' now",
        "estimate/step_seconds: 2.0 before, 2.00001 now",
    ]


def differences(was: Any, now: Any, place: str = "") -> list[str]:
    """Return a line for each value that differs, floats by more than `SAME` of themselves."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        pairs = [(f"{place}/{key}".lstrip("/"), was.get(key, _ABSENT), now.get(key, _ABSENT)) for key in keys]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = [(f"{place}[{n}]", *both) for n, both in enumerate(zip(was, now, strict=True))]
    elif was == now or _close(was, now):
        return []
    else:
        return [f"{place}: {was!r} before, {now!r} now"]
    return [line for name, old, new in pairs for line in differences(old, new, name)]


def _close(was: Any, now: Any) -> bool:
    return isinstance(was, float) and isinstance(now, float) and math.isclose(was, now, rel_tol=SAME)


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()
