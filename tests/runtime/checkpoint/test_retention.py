"""Which checkpoints stay."""

from __future__ import annotations

import math

import pytest
from meshwright.runtime.checkpoint.retention import Retention, expendable
from meshwright.sharding.errors import UserError

STEPS = {10: {"loss": 3.0}, 20: {"loss": 1.0}, 30: {"loss": 1.0}, 40: {}, 50: {"loss": math.nan}}


@pytest.mark.parametrize(
    ("rules", "gone"),
    [
        ({"keep_last": None}, []),
        ({"keep_last": 9}, []),
        ({"keep_last": 2}, [10, 20, 30]),
        ({"keep_last": 1, "keep_every": 20}, [10, 30]),
        ({"keep_last": 1, "keep_best": "loss"}, [10, 20, 40]),
        ({"keep_last": 1, "keep_best": "loss", "best_mode": "max"}, [20, 30, 40]),
        ({"keep_last": 1, "keep_best": "accuracy"}, [10, 20, 30, 40]),
    ],
)
def test_keeps_the_last_the_multiples_and_the_best(rules, gone) -> None:
    assert expendable(Retention(**rules), STEPS) == gone


def test_refuses_to_keep_nothing() -> None:
    with pytest.raises(UserError, match="keep_last=0 keeps nothing"):
        Retention(keep_last=0)
    with pytest.raises(UserError, match="best_mode='lowest'"):
        Retention(best_mode="lowest")  # pyright: ignore[reportArgumentType]
