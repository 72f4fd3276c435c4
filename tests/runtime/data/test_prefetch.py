"""The thread that makes batches ahead of their use."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import time

import pytest
from meshwright.runtime.data import Prefetch
from meshwright.sharding.processes import run


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "meshwright-prefetch"]


def test_items_come_in_order_and_then_end() -> None:
    with Prefetch(lambda: iter(range(20)), depth=3) as items:
        assert list(items) == list(range(20))
        assert list(items) == []
    assert not threads()


def test_no_more_than_depth_are_made_ahead() -> None:
    made = []
    stalled = threading.Event()

    def source():
        for number in itertools.count():
            made.append(number)
            if number == 3:
                stalled.set()
            yield number

    with Prefetch(source, depth=2) as items:
        assert next(items) == 0
        assert stalled.wait(10)
        time.sleep(0.05)
        # One taken, two ready, one in the thread's hands.
        assert made == [0, 1, 2, 3]


def test_an_error_comes_out_in_its_turn() -> None:
    def source():
        yield 1
        raise OSError("the disk is gone")

    items = Prefetch(source, depth=4)
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(items)
    assert any(entry.name == "source" for entry in caught.traceback)
    with pytest.raises(StopIteration):
        next(items)
    assert not threads()


def test_an_error_at_the_start_comes_out() -> None:
    def start():
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        next(Prefetch(start, depth=1))


def test_closing_ends_the_source_and_the_thread() -> None:
    closed = threading.Event()

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    items = Prefetch(source, depth=2)
    next(items)
    items.close()
    items.close()
    assert closed.is_set()
    assert not threads()
    with pytest.raises(StopIteration):
        next(items)


def test_a_forgotten_iterator_takes_its_thread_along() -> None:
    items = Prefetch(itertools.count, depth=2)
    next(items)
    assert threads()
    del items
    gc.collect()
    assert not threads()


def test_nothing_is_made_while_it_is_held() -> None:
    made: list[int] = []

    def source():
        for number in range(100):
            made.append(number)
            yield number

    with Prefetch(source, depth=2) as items:
        next(items)
        with items.held() as ready:
            assert next(items) == 1
            time.sleep(0.1)
            before = len(made)
            # One more may have been at hand when two were ready.
            assert set(ready) <= set(made)
            next(items)
            time.sleep(0.1)
            assert len(made) == before
        assert [next(items) for _ in range(5)] == list(range(3, 8))


def test_the_time_waited_is_told() -> None:
    def source():
        for number in range(3):
            time.sleep(0.05)
            yield number

    with Prefetch(source, depth=1) as items:
        next(items)
        assert items.wait_seconds > 0
        time.sleep(0.2)
        next(items)
        assert items.wait_seconds < 0.05


def test_the_interpreter_ends_with_batches_under_way(texts, tmp_path) -> None:
    program = f"""
import jax
from meshwright.runtime.data import DataConfig, open_data
config = DataConfig(source={str(texts)!r}, cache={str(tmp_path / "cache")!r}, sequence=16, read_threads=2)
data = open_data(config, seed=0, global_batch=8)
batches = data.iterate(0, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
next(batches)
print("last line")
"""
    done = run([sys.executable, "-c", program], timeout_seconds=60)
    assert (done.returncode, done.stdout) == (0, "last line\n")
    assert "Traceback" not in done.stderr
    assert "Fatal" not in done.stderr


def test_the_source_is_closed_at_interpreter_exit() -> None:
    program = """
import itertools
from meshwright.runtime.data import Prefetch
def source():
    try:
        yield from itertools.count()
    finally:
        print("closed")
items = Prefetch(source, depth=2)
next(items)
"""
    done = run([sys.executable, "-c", program], timeout_seconds=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")
