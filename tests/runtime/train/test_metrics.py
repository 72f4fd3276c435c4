"""Records of steps: in order, complete, without holding the loop, in every sink."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from meshwright.runtime.train.metrics import (
    IN_FLIGHT,
    Collector,
    JsonLines,
    NotFinite,
    TensorBoard,
    check_metrics,
    read_lines,
)
from meshwright.sharding import UserError


class Kept:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = False

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))

    def close(self) -> None:
        self.closed = True


def submit(
    collector: Collector, step: int, loss: Any = 1.0, metrics: Mapping[str, Any] | None = None, **more: Any
) -> None:
    collector.wait_for_slot(step)
    values = {
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(2.0),
        "learning_rate": jnp.float32(0.5),
        "weight": jnp.float32(64),
        **(metrics or {}),
    }
    collector.submit(step, values, asked_at=time.perf_counter(), data_wait_seconds=0.25, **more)


def test_records_come_in_order_and_complete() -> None:
    sinks = [Kept(), Kept()]
    collector = Collector(sinks, tokens_per_step=100)
    for step in range(1, 21):
        submit(collector, step, loss=step / 2)
    collector.drain()
    assert sinks[0].records == sinks[1].records
    assert [record["step"] for record in sinks[0].records] == list(range(1, 21))
    assert [record["loss"] for record in sinks[0].records] == [step / 2 for step in range(1, 21)]
    for record in sinks[0].records:
        assert set(record) == {
            "step",
            "loss",
            "grad_norm",
            "learning_rate",
            "step_seconds",
            "tokens_per_second",
            "data_wait_seconds",
        }
        assert all(isinstance(value, int | float) for value in record.values())
        assert record["step_seconds"] > 0
        assert record["tokens_per_second"] == pytest.approx(100 / record["step_seconds"])
        assert record["data_wait_seconds"] == 0.25
    collector.close()
    assert all(sink.closed for sink in sinks)
    assert collector.last == sinks[0].records[-1]


def test_close_writes_what_was_submitted() -> None:
    sink = Kept()
    collector = Collector([sink], tokens_per_step=1)
    submit(collector, 1)
    submit(collector, 2)
    collector.close()
    assert [record["step"] for record in sink.records] == [1, 2]


def test_evaluations_are_weighted_means() -> None:
    sink = Kept()
    collector = Collector([sink], tokens_per_step=1)
    pairs = [(jnp.float32(1.0), jnp.float32(30)), (jnp.float32(4.0), jnp.float32(10))]
    coming: concurrent.futures.Future[Any] = concurrent.futures.Future()
    submit(collector, 1, evaluation=coming)
    time.sleep(0.2)
    coming.set_result(pairs)
    submit(collector, 2)
    collector.close()
    assert sink.records[0]["eval_loss"] == pytest.approx(1.75)
    assert sink.records[0]["step_seconds"] < 0.2, "waiting for the evaluation is no part of the step"
    assert "eval_loss" not in sink.records[1]
    assert collector.last == sink.records[1]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_loop(loss: float) -> None:
    sink = Kept()
    collector = Collector([sink], tokens_per_step=1)
    submit(collector, 1)
    submit(collector, 2, loss=loss)

    def go_on() -> None:
        for step in range(3, 20):
            submit(collector, step)

    with pytest.raises(
        NotFinite, match=f"the loss of step 2 is {loss}, its gradient norm 2.0; nothing of that step is kept"
    ):
        go_on()
    collector.close()
    assert [record["step"] for record in sink.records] == [1]


def test_a_gradient_that_is_not_finite_stops_it_though_the_loss_is() -> None:
    collector = Collector([Kept()], tokens_per_step=1)
    submit(collector, 1, metrics={"grad_norm": jnp.float32("inf")})
    with pytest.raises(NotFinite, match=r"the loss of step 1 is 1\.0, its gradient norm inf"):
        collector.drain()
    collector.close()


def test_items_of_an_array_are_logged_by_their_places() -> None:
    sink = Kept()
    collector = Collector([sink], tokens_per_step=1)
    submit(collector, 1, metrics={"hits": jnp.array([[3, 4], [5, 6]]), "share": jnp.array([True])})
    collector.close()
    record = sink.records[0]
    assert [record[f"hits/{at}"] for at in ("0/0", "0/1", "1/0", "1/1")] == [3, 4, 5, 6]
    assert record["share/0"] == 1


def test_an_aux_value_takes_no_name_of_the_records_own() -> None:
    sink = Kept()
    collector = Collector([sink], tokens_per_step=1)
    submit(collector, 1, metrics={"step": jnp.float32(7), "eval_loss": jnp.float32(8)})
    collector.close()
    record = sink.records[0]
    assert (record["step"], record["aux/step"], record["aux/eval_loss"]) == (1, 7, 8)
    assert "eval_loss" not in record


@pytest.mark.parametrize(
    ("shape", "dtype"), [((8, 9), "float32"), ((), "complex64"), ((65,), "bool"), ((1000,), "int32")]
)
def test_an_aux_value_that_no_log_can_hold_is_refused(shape: tuple[int, ...], dtype: str) -> None:
    values = {"loss": jax.ShapeDtypeStruct((), "float32"), "odd": jax.ShapeDtypeStruct(shape, dtype)}
    with pytest.raises(UserError, match=r"the loss's aux value 'odd' is .*return its mean or norm"):
        check_metrics(values)
    check_metrics({"few": jax.ShapeDtypeStruct((8, 8), "bfloat16"), "one": jax.ShapeDtypeStruct((), "bool")})


def test_it_stops_at_the_end_of_the_run_too() -> None:
    collector = Collector([Kept()], tokens_per_step=1)
    submit(collector, 1, loss=float("nan"))
    with pytest.raises(NotFinite):
        collector.drain()
    collector.close()


def test_a_loss_that_is_not_finite_may_be_let_pass(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    collector = Collector([JsonLines(path, 0)], tokens_per_step=1, stop_on_nan=False)
    submit(collector, 1, loss=float("nan"))
    submit(collector, 2)
    collector.close()
    assert [record["loss"] for _, record in read_lines(path)] == [None, 1.0]
    assert "NaN" not in path.read_text()


def test_a_sink_that_fails_fails_the_loop() -> None:
    class Full(Kept):
        def write(self, record: Mapping[str, Any]) -> None:
            raise OSError(28, "No space left on device")

    collector = Collector([Full()], tokens_per_step=1)
    submit(collector, 1)
    with pytest.raises(OSError, match="No space left"):
        collector.drain()
    collector.close()


def test_the_loop_may_be_ahead_by_a_few_steps_and_no_more() -> None:
    allowed = threading.Event()

    class Slow(Kept):
        def write(self, record: Mapping[str, Any]) -> None:
            assert allowed.wait(30)
            super().write(record)

    sink = Slow()
    collector = Collector([sink], tokens_per_step=1)
    for step in range(1, IN_FLIGHT + 1):
        submit(collector, step)  # returns although no step has been written
    assert sink.records == []
    ahead = threading.Thread(target=submit, args=(collector, IN_FLIGHT + 1))
    ahead.start()
    ahead.join(0.2)
    assert ahead.is_alive()
    allowed.set()
    ahead.join(30)
    collector.close()
    assert len(sink.records) == IN_FLIGHT + 1


def lines_of(path: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_json_lines_go_on_after_the_step_that_was_restored(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for step in range(1, 8):
        first.write({"step": step, "loss": 1.0})
    first.close()
    kept = path.read_text().splitlines()[:4]
    second = JsonLines(path, 4)
    assert path.read_text().splitlines() == kept
    second.write({"step": 5, "loss": 0.5})
    assert lines_of(path) == [1, 2, 3, 4, 5]  # each line is there as soon as it is written
    second.close()


def test_a_line_cut_short_is_left_out(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n'
    path.write_text(whole + '{"step": 3, "lo')
    assert [record["step"] for _, record in read_lines(path)] == [1, 2]
    resumed = JsonLines(path, 9)
    resumed.write({"step": 3, "loss": 2.0})
    resumed.close()
    assert lines_of(path) == [1, 2, 3]


def test_bytes_that_a_crash_left_behind_are_left_out(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n\x00\x00\xff\xfe')
    JsonLines(path, 9).close()
    assert lines_of(path) == [1]


def test_a_run_that_starts_anew_starts_an_empty_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    JsonLines(path, 0).close()
    assert path.read_text() == ""
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_events_hold_every_number(tmp_path: pathlib.Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    sink = TensorBoard(tmp_path / "tensorboard")
    sink.write({"step": 3, "loss": 1.5, "eval_loss": 2.5})
    sink.write({"step": 4, "loss": 1.25})
    sink.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    content, at, found = file.read_bytes(), 0, []
    while at < len(content):  # length, its checksum, the event, its checksum
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += length + 16
    assert found == [(3, "loss", 1.5), (3, "eval_loss", 2.5), (4, "loss", 1.25)]
