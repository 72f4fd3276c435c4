"""Bytes at the fullest moment of a step, of programs with several scans over layers."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import plan

WIDTH, HIDDEN, ROWS, ENCODER, DECODER = 32, 256, 1024, 4, 7
STREAM = ROWS // 8 * WIDTH * 4


def layer(p: Any, x: Any, memory: Any = None) -> Any:
    inside = x @ p["up"]
    if memory is not None:
        inside += memory @ p["cross"]
    return x + jnp.tanh(inside) @ p["down"]


def loss(params: Any, batch: Any) -> Any:
    x, y = batch["source"], batch["target"]
    for p in params["encoder"]:
        x = layer(p, x)
    for p in params["decoder"]:
        y = layer(p, y, x)
    return jnp.square(y).mean()


def scanned(params: Any, batch: Any) -> Any:
    x = jax.lax.scan(lambda x, p: (layer(p, x), None), batch["source"], params["encoder"])[0]
    y = jax.lax.scan(lambda y, p: (layer(p, y, x), None), batch["target"], params["decoder"])[0]
    return jnp.square(y).mean()


def arrays(count: int, *, cross: bool) -> list[Any]:
    def one(number: int) -> dict[str, Any]:
        keys = jax.random.split(jax.random.key(number), 3)
        shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "cross": (WIDTH, HIDDEN)}
        if not cross:
            del shapes["cross"]
        return {
            name: 0.1 * draws.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=False)
        }

    return [one(count * cross + number) for number in range(count)]


def made_params() -> Any:
    return {"encoder": arrays(ENCODER, cross=False), "decoder": arrays(DECODER, cross=True)}


def made_batch() -> Any:
    keys = jax.random.split(jax.random.key(7))
    names = ("source", "target")
    return {name: draws.normal(key, (ROWS, WIDTH)) for name, key in zip(names, keys, strict=True)}


def planned(loss: Any, params: Any, batch: Any, remat: str) -> Any:
    return plan(loss, params, batch, topology="cpu:8", mesh={"data": 8}, remat=remat, microbatches=1)


@pytest.mark.parametrize("written", ["in loops", "scanned"])
def test_every_stack_keeps_its_layers_inputs_alone_under_remat(written: str) -> None:
    params, batch = made_params(), made_batch()
    if written == "scanned":
        params = {name: jax.tree.map(lambda *one: jnp.stack(one), *each) for name, each in params.items()}
    function = loss if written == "in loops" else scanned
    kept = {
        remat: planned(function, params, batch, remat).estimate.memory["saved_activations"]
        for remat in ("none", "full")
    }
    inputs = (ENCODER + DECODER) * STREAM
    # Besides what layers are handed: what the encoder gives, and what the loss is of.
    assert inputs <= kept["full"] <= inputs + 3 * STREAM
    assert kept["none"] > inputs + (ENCODER + DECODER) * STREAM * HIDDEN / WIDTH


@pytest.mark.numerics
@pytest.mark.devices(8)
def test_both_stacks_run_under_remat_on_eight_devices() -> None:
    params, batch = made_params(), made_batch()
    made = planned(loss, params, batch, "full")
    with jax.default_matmul_precision("highest"):
        applied = jax.value_and_grad(made.apply(loss, mesh=made.make_mesh()))
        text = str(jax.make_jaxpr(applied)(params, batch))
        got = jax.jit(applied)(params, batch)
        expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    assert text.count("remat2[") + text.count("checkpoint[") >= 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)
