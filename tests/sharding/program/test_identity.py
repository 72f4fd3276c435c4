"""Fingerprints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import zoo
from meshwright.sharding.ops import experts as mixtures
from meshwright.sharding.program import trace

_TESTS = Path(__file__).parents[2]
_PRINT = """
import zoo
from meshwright.sharding.program import trace
case = zoo.unet()
print(trace(case.loss, *case.shapes()).fingerprint)
"""


def fingerprint(case) -> str:
    return trace(case.loss, *case.shapes()).fingerprint


def test_another_process_agrees():
    ran = subprocess.run(
        [sys.executable, "-c", _PRINT], cwd=_TESTS, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split()[-1] == fingerprint(zoo.unet())


def test_it_changes_with_sizes_and_structure():
    prints = {
        fingerprint(case) for case in (zoo.lstm(), zoo.lstm(scale=2), zoo.decoder(), zoo.decoder(layers=3))
    }
    assert len(prints) == 4


def test_it_does_not_change_from_one_tracing_to_the_next():
    assert fingerprint(zoo.decoder()) == fingerprint(zoo.decoder())


def test_it_is_the_same_however_experts_are_carried_out(monkeypatch: pytest.MonkeyPatch):
    """So that a plan's file outlives another way of doing the same."""

    def loss(params, batch):
        chosen = jnp.argsort(batch @ params["router"])[..., :2]
        call = {name: params[name] for name in ("up", "down")}
        return mixtures.experts(batch, jnp.ones(chosen.shape), chosen, **call, activation="gelu").sum()

    shapes = {"router": (8, 4), "up": (4, 8, 16), "down": (4, 16, 8)}
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    arguments = params, jax.ShapeDtypeStruct((2, 16, 8), "float32")
    one = trace(loss, *arguments)
    jax.clear_caches()
    monkeypatch.setattr(mixtures, "by_expert", lambda call, x, *_: jnp.tanh(x))
    mixtures.jitted.cache_clear()
    other = trace(loss, *arguments)
    mixtures.jitted.cache_clear()
    assert one.fingerprint == other.fingerprint
