"""Parameters that lie whole beside moments in parts: their values, and what the real compilers hold."""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import Plan, declare
from meshwright.sharding.hlo.text import parse_hlo
from meshwright.sharding.transform import compose
from meshwright.sharding.verify.verify import verify

LAYERS, WIDTH, ROWS = 4, 512, 64


def loss(params: Any, batch: Any) -> Any:
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, params["w"])
    return jnp.mean(jnp.square(x))


def in_parts(topology: str, params: Any, batch: Any, optimizer: Any, devices: int) -> Plan:
    made = declare(loss, params, batch, topology=topology, mesh={"data": devices}, optimizer=optimizer)
    return dataclasses.replace(made, moments={"w": (None, "data")})


@pytest.mark.numerics
@pytest.mark.devices(8)
def test_gathered_changes_train_as_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    of = compose.compiler_of
    monkeypatch.setattr(compose, "compiler_of", lambda on: dataclasses.replace(of(on), gathers_copy=True))
    params = {"w": draws.normal(jax.random.key(0), (LAYERS, 16, 16))}
    batch, optimizer = draws.normal(jax.random.key(1), (16, 16)), optax.adam(1e-2)
    made = in_parts("cpu:8", params, batch, optimizer, 8)
    state = made.init(lambda key: params, jax.random.key(0), optimizer)
    step, plain, moments = made.train_step(loss, optimizer), params, optimizer.init(params)
    slope = jax.jit(jax.grad(loss))
    for _ in range(3):
        state, _ = step(state, batch)
        changes, moments = optimizer.update(slope(plain, batch), moments, plain)
        plain = optax.apply_updates(plain, changes)
    assert state["params"]["w"].sharding.is_fully_replicated
    assert not state["optimizer"][0].mu["w"].sharding.is_fully_replicated
    np.testing.assert_allclose(state["params"]["w"], plain["w"], atol=2e-5)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.slow
def test_a_step_copies_no_parameters(
    topology: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = {"w": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)}
    batch = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    optimizer = optax.adam(1e-3)
    made = in_parts(topology, params, batch, optimizer, 4)
    assert verify(made, loss, params, batch, optimizer, quick=True).fits
    (text,) = tmp_path.rglob("program.hlo.gz")
    found = parse_hlo(gzip.decompress(text.read_bytes()).decode()).instructions.values()
    whole = f"f32[{LAYERS},{WIDTH},{WIDTH}]"
    assert any(one.collective is not None and whole in one.shape for one in found)
    assert not [one.name for one in found if one.opcode == "copy" and whole in one.shape]
