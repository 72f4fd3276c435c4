"""Where sequences begin again."""

import pytest
from meshwright.runtime.profiling.events import OpEvent
from meshwright.runtime.profiling.repetition import blocks, period


def sequence(ops, gaps=()):
    at, events = 0, []
    for k, op in enumerate(ops):
        at += 100 if k in gaps else 1
        events.append(
            OpEvent(device="gpu:0", line="s", op=op, module="m", run=None, start_ns=at, end_ns=at + 5)
        )
        at += 5
    return events


@pytest.mark.parametrize(
    ("text", "wanted"), [("abab", 2), ("aaaa", 1), ("abcabca", 3), ("abcd", 4), ("aabaab", 3), ("", 0)]
)
def test_the_smallest_period(text, wanted):
    assert period(text) == wanted


def test_a_trace_that_begins_amid_an_execution_is_divided_at_the_gaps():
    events = sequence("cabcabcab", gaps=(1, 4, 7))
    assert blocks(events, 0) == [events[k].start_ns for k in (0, 3, 6)]
    cut = sequence("bcabcabcab", gaps=(2, 5, 8))
    assert blocks(cut, 0) == [cut[k].start_ns for k in (2, 5, 8)]


def test_what_does_not_repeat_has_no_executions():
    assert blocks(sequence("abcd"), 0) == []


def test_turns_of_a_loop_are_no_more_executions_than_were_launched():
    events = sequence("aaaaaaaa")
    assert len(blocks(events, 0)) == 8
    assert len(blocks(events, 0, most=2)) == 2
    assert len(blocks(events, 0, most=1)) == 1
