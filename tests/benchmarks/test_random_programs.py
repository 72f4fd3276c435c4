"""A few random programs under microbatches; `benchmarks/accumulation.py --random` tries thousands."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import random_accumulation
import random_gradients
import random_programs

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]


def test_random_programs_are_the_whole_batch_or_refused() -> None:
    why = Counter[str]()
    with jax.enable_x64(True):
        found = Counter(outcome for outcome, _ in random_accumulation.tried(300, 24, 0, why))
    assert set(found) <= {"exact", "refused", "exact, with less", "refused, with less"}
    assert found["exact"] >= 10
    assert found["refused"] == why.total()


def test_each_statement_of_a_kind_is_the_whole_batch_or_refused() -> None:
    why = Counter[str]()
    with jax.enable_x64(True):
        found = Counter(outcome for outcome, _ in random_accumulation.each(["held"], 0, why))
    assert set(found) <= {"exact", "refused", "JAX refuses it"}
    assert found["exact"] >= 25


def test_a_fault_is_found_and_reduced_to_the_statements_that_it_takes(monkeypatch, capsys) -> None:
    """A clipped gradient of what all examples share, were it not seen for what it is."""
    monkeypatch.setattr("meshwright.sharding.transform.accumulation.graph.uneven_call", lambda *_: None)
    monkeypatch.setattr(random_programs, "GROUPS", ({"written": random_programs.KINDS["written"]},))
    monkeypatch.setattr(random_gradients, "BACKWARD", {"one": random_gradients.BACKWARD["one"]})
    with jax.enable_x64(True):
        found = Counter(outcome for outcome, _ in random_accumulation.tried(300, 8, 0, Counter()))
    assert found["WRONG"] >= 1
    assert "= written" in capsys.readouterr().out
