"""Which keys of two configurations differ."""

from __future__ import annotations

from meshwright.runtime.checkpoint import differing_keys

OLD = {"model": {"layers": 2, "dims": [1, 2]}, "train": {"steps": 10, "rate": float("nan")}, "seed": 0}


def test_names_each_key_with_both_values() -> None:
    new = {
        "model": {"layers": 4, "dims": (1, 2)},
        "train": {"steps": 10, "rate": float("nan")},
        "extra": {"a": 1},
    }
    assert [str(difference) for difference in differing_keys(OLD, new)] == [
        "model.layers: 2 → 4",
        "seed: 0 → (absent)",
        "extra: (absent) → {'a': 1}",
    ]


def test_same_configs_do_not_differ() -> None:
    assert differing_keys(OLD, OLD) == []


def test_ignores_a_key_a_branch_or_a_pattern() -> None:
    new = {"model": {"layers": 4, "dims": []}, "train": {"steps": 20, "rate": 0.1}, "seed": False}
    assert [d.key for d in differing_keys(OLD, new, ignore=["train", "model.*"])] == ["seed"]
    assert [d.key for d in differing_keys(OLD, new, ignore=["train.steps", "model", "seed"])] == [
        "train.rate"
    ]
