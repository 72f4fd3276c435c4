"""Layers in a loop are planned as a scan, or as they are written where that is faster."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import meshwright.sharding as ms
import pytest

HALF = jnp.bfloat16
WIDTH, LAYERS = 2048, 6


def shape(*sizes: int, dtype: Any = HALF) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


PARAMS = [{"up": shape(WIDTH, 4 * WIDTH), "down": shape(4 * WIDTH, WIDTH)} for _ in range(LAYERS)]


def layer(p: Any, x: Any) -> Any:
    return jax.nn.relu(x + jax.nn.relu(x @ p["up"]) @ p["down"])


def loss(params: Any, x: Any) -> Any:
    for p in params:
        x = layer(p, x)
    return jnp.mean(x.astype(jnp.float32))


def scanned(params: Any, x: Any) -> Any:
    x, _ = jax.lax.scan(lambda x, p: (layer(p, x), None), x, params)
    return jnp.mean(x.astype(jnp.float32))


@pytest.mark.parametrize("topology", ["v5e:1x1", "h100:1x1"])
def test_stacks_that_cost_more_than_they_win_are_not_made(topology: str) -> None:
    x = shape(64, WIDTH)
    made = ms.plan(loss, PARAMS, x, topology=topology)
    assert made.recognise == ("attention", "losses")
    assert [one for one in made.notes if "layers stay as they are written" in one]
    assert "run as scans" not in " ".join(made.notes)
    assert ms.Plan.from_dict(made.to_dict()).recognise == made.recognise
    rolled = ms.declare(loss, PARAMS, x, topology=topology, mesh={"data": 1})
    assert rolled.recognise == ("attention", "losses", "layers")
    assert made.estimate is not None
    assert rolled.estimate is not None
    assert made.estimate.step_seconds < 0.9 * rolled.estimate.step_seconds
    assert "stacks" not in made.estimate.time


def test_a_batch_that_is_worth_it_is_run_as_a_scan() -> None:
    made = ms.plan(loss, PARAMS, shape(2**16, WIDTH), topology="v5e:1x1")
    assert made.recognise == ("attention", "losses", "layers")


def test_the_cut_between_layers_goes_through_no_kernel() -> None:
    """A nonlinearity at a layer's end is one kernel with what comes before it, in the loop as in a scan."""
    x = shape(2**16, WIDTH)
    how: Any = {"topology": "h100:1x8", "mesh": {"data": 8}}
    stacks = {name: shape(LAYERS, *one.shape) for name, one in PARAMS[0].items()}
    one, other = ms.declare(loss, PARAMS, x, **how), ms.declare(scanned, stacks, x, **how)
    assert one.estimate is not None
    assert other.estimate is not None
    seconds = [made.estimate.time["compute/elementwise"] for made in (one, other)]  # type: ignore[union-attr]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-3)
