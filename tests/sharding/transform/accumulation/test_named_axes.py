"""Losses that give a dimension a name (`jax.vmap(axis_name=...)`) and sum over it, in parts."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, WIDTH = 32, 8


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": draws.normal(keys[0], (WIDTH, WIDTH))}
    return params, {"x": draws.normal(keys[1], (ROWS, WIDTH)), "y": draws.normal(keys[2], (ROWS, WIDTH))}


def mean_of_the_batch(p, b):
    """Statistics of the batch, as Equinox and Flax take them where each example is mapped over."""

    def one(x, y):
        h = x @ p["w"]
        mean = jax.lax.pmean(h, "batch")
        return jnp.square(jnp.tanh(h - mean) - y).mean(), mean

    losses, mean = jax.vmap(one, axis_name="batch", out_axes=(0, None))(b["x"], b["y"])
    return losses.mean(), {"mean": mean}


def largest_of_groups(p, b):
    """The largest of groups that follow one another as blocks of rows, which may be the parts themselves."""

    def one(x, y):
        h = jnp.tanh(x @ p["w"])
        largest = jax.lax.stop_gradient(jax.lax.pmax(jnp.abs(jax.lax.stop_gradient(h)).max(), "group"))
        return jnp.square(h / largest - y).mean(-1), jax.lax.pmin(jax.lax.stop_gradient(h).min(), "group")

    grouped = (one.reshape(4, ROWS // 4, WIDTH) for one in (b["x"], b["y"]))
    losses, least = jax.vmap(one, axis_name="group")(*grouped)
    return losses.mean(), {"least": least.min()}


def sums_of_neighbours(p, b):
    def one(x, y):
        h = jnp.tanh(x @ p["w"])
        return jnp.square(h - jax.lax.psum(h, "near") / 4 - y).mean()

    grouped = (one.reshape(-1, 4, WIDTH) for one in (b["x"], b["y"]))
    losses = jax.vmap(jax.vmap(one, axis_name="near"))(*grouped)
    return losses.mean(), {"each": losses}


@pytest.mark.parametrize(
    "loss", [mean_of_the_batch, largest_of_groups, sums_of_neighbours], ids=lambda loss: loss.__name__
)
def test_sums_over_a_named_dimension_are_of_the_whole_batch(loss):
    rows = arguments()
    layout = declare(loss, *rows, topology="cpu:8", mesh={"data": 8}, microbatches=4, max_passes=4)
    want = jax.jit(jax.value_and_grad(loss, has_aux=True))(*rows)
    got = jax.jit(jax.value_and_grad(layout.apply(loss), has_aux=True))(*rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
