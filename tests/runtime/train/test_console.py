"""What a terminal shows of a run."""

from __future__ import annotations

import re
from typing import Any

import pytest
from meshwright.runtime.train.console import console


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.5,
        "grad_norm": 1.0,
        "step_seconds": 0.5,
        "tokens_per_second": 8192.0,
        "data_wait_seconds": 0.0,
    } | changes


def shown(capsys: pytest.CaptureFixture[str], records: list[dict[str, Any]], **changes: Any) -> list[str]:
    how: dict[str, Any] = {
        "kind": "lines",
        "steps": 10,
        "start_step": 0,
        "every": 1,
        "peak_flops": None,
        "step_flops": 1e12,
    } | changes
    sink = console(how.pop("kind"), **how)
    for each in records:
        sink.write(each)
    sink.close()
    captured = capsys.readouterr()
    assert captured.out == ""  # what a run prints for other programs stays apart from its progress
    return captured.err.splitlines()


def test_a_line_has_loss_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = shown(capsys, [record(4)])
    assert line == "step 4/10  loss 2.5000  8,192 tokens/s  ETA 0:03"


def test_utilisation_is_shown_where_the_chip_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = shown(capsys, [record(4)], peak_flops=8e12)
    assert "MFU 25.0%" in line
    (line,) = shown(capsys, [record(4)], peak_flops=None)
    assert "MFU" not in line


def test_lines_come_first_last_when_due_and_with_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(step) for step in range(1, 11)]
    records[5]["eval_loss"] = 1.25
    lines = shown(capsys, records, every=4)
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [1, 4, 6, 8, 10]
    assert [line for line in lines if "held-out loss 1.2500" in line] == [lines[2]]


def test_a_resumed_run_shows_its_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, [record(7), record(8), record(9)], start_step=6, every=5)
    assert [line.split()[1] for line in lines] == ["7/10"]


def test_the_compiling_step_does_not_count_for_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    slow = record(1, step_seconds=60.0, tokens_per_second=68.0)
    lines = shown(capsys, [slow, record(2, step_seconds=1.0)], steps=100)
    assert "ETA 1:39:00" in lines[0]
    assert "ETA 1:38" in lines[1]


def test_the_last_line_says_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = shown(capsys, [record(10)])
    assert "ETA" not in line
    assert re.search(r"took \d+:\d\d$", line)


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, [record(step) for step in range(1, 11)], kind="none") == []


def test_without_a_terminal_auto_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, [record(1)], kind="auto")[0].startswith("step 1/10  loss 2.5000")


def test_the_bar_ends_with_the_last_words(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, [record(1), record(2, eval_loss=1.5)], kind="bar", steps=2)
    text = " ".join(" ".join(lines).split())
    assert "2/2" in text
    assert "held-out loss 1.5" in text
