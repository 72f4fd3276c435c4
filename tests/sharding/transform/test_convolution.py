"""Convolutions in groups keep their gradients where an axis of the mesh cuts nothing of them."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, SIZE, CHANNELS = 16, 5, 8


def convolve(x, filters):
    """Slide filters over the places between rows and channels, in as many groups as the filters say."""
    places = "HWD"[: x.ndim - 2]
    forms = f"N{places}C", f"{places}IO", f"N{places}C"
    groups = x.shape[-1] // filters.shape[-2]
    return jax.lax.conv_general_dilated(
        x, filters, (1,) * len(places), "SAME", dimension_numbers=forms, feature_group_count=groups
    )


def separable(p, b):
    """A convolution of each channel by itself, then one of each place, as in MobileNet."""
    return jnp.square(convolve(jnp.tanh(convolve(b["x"], p["each"])), p["all"])).mean()


def over_time(p, b):
    """A short convolution of each channel over time, as in Mamba."""
    return jnp.square(jnp.tanh(convolve(b["x"][:, 0], p["each"][0])) @ p["all"][0, 0]).mean()


def in_groups(p, b):
    return jnp.square(convolve(jnp.tanh(convolve(b["x"], p["groups"])), p["all"])).mean()


def adapted(p, b):
    """A loss after a step of its own, whose gradient is a part of the program."""
    tried = {**p, "each": p["each"] - 0.5 * jax.grad(separable)(p, b)["each"]}
    return separable(tried, {"x": b["x"] * 2})


LOSSES = {
    "separable": separable,
    "over time": pytest.param(over_time, marks=pytest.mark.slow),
    "in groups": pytest.param(in_groups, marks=pytest.mark.slow),
    "adapted": adapted,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_of_filters_are_those_of_all_rows(loss):
    keys = jax.random.split(jax.random.key(0), 4)
    p = {
        "each": draws.normal(keys[0], (3, 3, 1, CHANNELS)),
        "groups": draws.normal(keys[1], (3, 3, 2, CHANNELS)),
        "all": draws.normal(keys[2], (1, 1, CHANNELS, 16)),
    }
    b = {"x": draws.normal(keys[3], (ROWS, SIZE, SIZE, CHANNELS))}
    names = {"each": (None,) * 4, "groups": (None,) * 4, "all": (None, None, None, "mlp")}
    made = declare(loss, p, b, topology="cpu:8", mesh={"data": 4, "tensor": 2}, names=names)
    want, got = (jax.jit(jax.value_and_grad(one))(p, b) for one in (loss, made.apply(loss)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
