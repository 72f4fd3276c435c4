"""What was predicted of a step, put beside what its devices do."""

from __future__ import annotations

import json
import pathlib

import pytest
from meshwright.runtime.profiling.profile import CollectiveTime, Profile, StepTime
from meshwright.runtime.train.prediction import FirstSteps, Prediction, StepCost
from meshwright.sharding.plans.estimate import Estimate

GIB = 2**30
ESTIMATE = Estimate(
    step_seconds=0.5,
    mfu=0.4,
    peak_bytes=30 * GIB,
    time={"compute": 0.3, "optimizer": 0.05, "all_gather/fsdp": 0.1, "offload/host": 0.02, "host": 0.03},
    memory={"params": 20 * GIB, "residuals": 10 * GIB},
)
PREDICTION = Prediction(estimate=ESTIMATE, compiled=StepCost(bytes=31 * GIB), where="h200:8")


def watch(step_seconds: dict[int, float], held: float = 31 * GIB, **more: object) -> list[str]:
    said: list[str] = []
    settings = {"start": 0, "traced": (), **more}
    first = FirstSteps(
        PREDICTION,
        cost=lambda spent: StepCost(seconds=spent, bytes=held, mfu=0.2 / spent),
        say=said.append,
        **settings,  # type: ignore[arg-type]
    )
    for step, spent in step_seconds.items():
        first.write({"step": step, "step_seconds": spent})
    first.close()
    return said


def test_the_first_steps_are_put_beside_what_was_predicted_once(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "prediction.json"
    said = watch({step: 9.0 if step < 3 else 0.51 for step in range(1, 40)}, file=file)
    assert said == [
        "a step on h200:8, steps 3 to 12:",
        "  estimate    500 ms    30.0 GiB  MFU 40.0%",
        "  compiler         -    31.0 GiB  MFU -",
        "  device      510 ms    31.0 GiB  MFU 39.2%",
    ]
    record = json.loads(file.read_text())
    assert (record["steps"], record["device"]["seconds"]) == ([3, 12], 0.51)
    assert record["estimate"]["step_seconds"] == 0.5


@pytest.mark.parametrize(
    ("spent", "more"), [(0.7, "40% more"), (0.3, "40% less"), (0.57, None), (0.43, None)]
)
def test_a_difference_above_fifteen_percent_is_a_note_with_the_largest_item(
    spent: float, more: str | None
) -> None:
    notes = [line for line in watch(dict.fromkeys(range(1, 14), spent)) if line.startswith("note: ")]
    assert len(notes) == (more is not None)
    if more is not None:
        assert f"{more} than the estimate's 500 ms, whose largest item is compute with 300 ms" in notes[0]


def test_memory_too() -> None:
    (note,) = (line for line in watch(dict.fromkeys(range(1, 14), 0.5), held=40 * GIB) if "note" in line)
    assert note == (
        "note: a device holds 40.0 GiB, 33% more than the estimate's 30.0 GiB, whose largest item is params "
        "with 20.0 GiB"
    )


def test_traced_steps_and_short_runs_are_left_out() -> None:
    times = {step: 5.0 if 5 <= step <= 7 else 0.5 for step in range(1, 30)}
    assert watch(times, traced=range(5, 8))[0] == "a step on h200:8, steps 3 to 15:"
    assert not any("note" in line for line in watch(times, traced=range(5, 8)))
    assert watch({1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5}) == []
    assert watch(dict.fromkeys(range(21, 26), 0.5), start=20)[0] == "a step on h200:8, steps 23 to 25:"


def test_a_window_tells_by_item_and_what_differs_most() -> None:
    gathers = CollectiveTime(
        kind="all_gather", axes="fsdp", count=4, exposed_seconds=0.3, overlapped_seconds=0.1
    )
    step = StepTime(
        step=5,
        device="gpu:0",
        wall_seconds=0.7,
        compute_seconds=0.36,
        collectives=(gathers,),
        data_wait_seconds=0.01,
        idle_seconds=0.03,
    )
    profile = Profile(
        platform="gpu",
        module="jit_update",
        mesh={"fsdp": 8},
        files=(),
        steps=(step,),
        host_steps=(),
        operations=(),
        notes=(),
    )
    lines = PREDICTION.by_item(profile)
    assert lines[1].split() == ["compute", "350", "ms", "360", "ms"]
    assert lines[2].split() == ["all_gather/fsdp", "100", "ms", "300", "ms"]
    assert lines[-1] == (
        "note: a traced step takes 700 ms, 40% more than estimated, most of it in all_gather/fsdp: "
        "300 ms for 100 ms"
    )
