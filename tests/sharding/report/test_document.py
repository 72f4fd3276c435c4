"""Which items of a report are worth a line, and how figures are written."""

from __future__ import annotations

import ast
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from meshwright.sharding import report
from meshwright.sharding.report.document import (
    WORTH_A_LINE,
    change,
    size_text,
    spec_in_words,
    time_text,
    total,
    worth_a_line,
)

SIZES = st.tuples(st.none() | st.floats(0, 1e3), st.none() | st.floats(0, 1e3))


@given(st.dictionaries(st.sampled_from("abcdefghij"), SIZES), st.floats(1e-3, 1e4))
def test_small_items_are_summed_up_and_none_is_lost(items: dict, whole: float) -> None:
    rows = dict(worth_a_line(items, whole))
    for side in (0, 1):
        of_items, of_rows = (total(row[side] for row in table.values()) for table in (items, rows))
        assert (of_rows or 0.0) == pytest.approx(of_items or 0.0)
    largest = [max(size or 0.0 for size in row) for name, row in rows.items() if name != "the rest"]
    assert largest == sorted(largest, reverse=True)
    # One small item keeps its name: its line would be as long.
    assert sum(size < WORTH_A_LINE * whole for size in largest) <= 1


def test_what_is_not_known_is_not_summed_up_as_nothing() -> None:
    items = {"a": (1.0, None), "b": (1e-4, None), "c": (2e-4, None)}
    assert worth_a_line(items, 1.0)[-1] == ("the rest", (pytest.approx(3e-4), None))


def test_the_room_has_one_threshold() -> None:
    """What is worth a line is decided in one place."""
    folder = pathlib.Path(report.__path__[0])
    found = [
        (path.name, ast.unparse(node))
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and "WORTH" in ast.unparse(node).upper()
    ]
    assert [name for name, _ in found] == ["document.py"]


def test_figures_are_written_short() -> None:
    assert (time_text(0.0), time_text(0.25)) == ("0", "250 ms")
    assert (size_text(0), size_text(16), size_text(2.0**30)) == ("0", "16 B", "1.0 GiB")
    assert [change(*pair) for pair in ((2.0, 3.0), (1.0, 3.0), (0.0, 1.0), (1.0, None))] == [
        "+50.0%",
        "x 3",
        "",
        "",
    ]
    assert spec_in_words([None, ["data", "fsdp"], "tensor"]) == "[-, dataxfsdp, tensor]"
