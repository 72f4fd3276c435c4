"""Parameters that lie whole beside moments in parts, through the real compilers."""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import declare
from meshwright.sharding.hlo.text import parse_hlo
from meshwright.sharding.verify.verify import verify

LAYERS, WIDTH, ROWS = 4, 512, 64


def loss(params: Any, batch: Any) -> Any:
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, params["w"])
    return jnp.mean(jnp.square(x))


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.slow
def test_a_step_copies_no_parameters(
    topology: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = {"w": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)}
    batch = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    optimizer = optax.adam(1e-3)
    made = declare(loss, params, batch, topology=topology, mesh={"data": 4}, optimizer=optimizer)
    made = dataclasses.replace(made, moments={"w": (None, "data")})
    assert verify(made, loss, params, batch, optimizer).fits
    (text,) = tmp_path.rglob("program.hlo.gz")
    found = parse_hlo(gzip.decompress(text.read_bytes()).decode()).instructions.values()
    whole = f"f32[{LAYERS},{WIDTH},{WIDTH}]"
    assert any(one.collective is not None and whole in one.shape for one in found)
    assert not [one.name for one in found if one.opcode == "copy" and whole in one.shape]
