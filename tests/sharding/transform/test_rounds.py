"""Rounds of a mixture's exchanges, counted as it runs: one where a router is even, more where it is not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import plan
from meshwright.sharding.ops.experts import experts

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

LAYERS, EMBED, EXPERTS, SEQUENCE = 2, 8, 8, 512


def loss(params: Any, batch: Any) -> Any:
    def layer(x: Any, own: Any) -> Any:
        scores = jax.nn.softmax(batch["scores"] + own["favour"])
        weights, chosen = jax.lax.top_k(scores, 2)
        return x + experts(x, weights, chosen, up=own["up"], down=own["down"], activation="gelu"), None

    return jnp.square(jax.lax.scan(layer, batch["x"], params)[0]).mean()


def test_rounds_are_counted_by_layer() -> None:
    rng = np.random.default_rng(0)
    params = {
        "favour": np.zeros((LAYERS, EXPERTS), np.float32),
        "up": rng.normal(size=(LAYERS, EXPERTS, EMBED, 8)).astype(np.float32),
        "down": rng.normal(size=(LAYERS, EXPERTS, 8, EMBED)).astype(np.float32),
    }
    # The first device's two experts are everybody's, in the second layer.
    params["favour"][1, :2] = 100.0
    batch = {
        "x": rng.normal(size=(8, SEQUENCE, EMBED)).astype(np.float32),
        "scores": rng.normal(size=(8, SEQUENCE, EXPERTS)).astype(np.float32),
    }
    names = {"up": ("layers", "experts", "embed", "mlp"), "down": ("layers", "experts", "mlp", "embed")}
    names["favour"] = ("layers", "scores")
    how: dict[str, Any] = {"mesh": {"expert": 4, "data": 2}, "names": names, "optimizer": optax.sgd(0.1)}
    made = plan(loss, params, batch, topology="cpu:8", **how)
    mesh = made.make_mesh()
    placed = jax.device_put(
        (params, batch), (made.shardings(params, mesh), made.shardings(batch, mesh, "batch"))
    )
    # 1,024 choices of a device, of which a round takes 384 to each of four.
    assert made.count_rounds(loss, *placed) == {1: 1, 3: 1}
