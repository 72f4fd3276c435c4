"""Bubbles and microbatches in flight of other frameworks, by the textbook."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from frameworks.stages import Stages, bubble_seconds, deal, in_flight


@pytest.mark.parametrize(("stages", "interleave"), [(4, 1), (8, 2)])
def test_equal_stages_wait_for_the_others_once(stages: int, interleave: int):
    each = 0.5
    found = bubble_seconds(Stages(slowest=each, together=stages * each), interleave)
    assert found == pytest.approx((stages - 1) * each / interleave)


def test_uneven_layers_count_on_the_fullest_stage():
    assert deal(80, 32).most == 3
    assert deal(80, 32).last == 3


def test_one_forward_one_backward_holds_as_many_microbatches_as_stages_are_left():
    assert [in_flight(stage, 4, 16, "1f1b", 1) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(0, 4, 16, "gpipe", 1) == 16
    assert in_flight(0, 4, 2, "1f1b", 1) == 2
    assert in_flight(0, 4, 16, "1f1b", 2) == pytest.approx(4 * (1 + 3 / 8))
