"""Moves of arrays under microbatches: of other dimensions values are kept, of examples they are refused."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import UserError, declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, TIME, WIDTH = 16, 4, 8


def arguments():
    params = {"w": draws.normal(jax.random.key(0), (WIDTH, WIDTH)) / 2, "at": jnp.array(1.0)}
    return params, {"x": draws.normal(jax.random.key(1), (ROWS, TIME, WIDTH))}


def hidden(p, b):
    return b["x"] @ p["w"]


def place(p):
    """Return a place that is known when the step runs."""
    return jnp.int32(jax.lax.stop_gradient(p["at"]))


def drawn(x):
    return x @ jnp.swapaxes(x, -1, -2) + 9 * jnp.eye(TIME)


# What is done with other dimensions than the examples'.
MOVES = {
    "reshape": lambda p, h: h.reshape(ROWS, TIME * WIDTH)[:, 3],
    "rows and time as one": lambda p, h: jnp.tanh(h.reshape(ROWS * TIME, WIDTH)),
    "squeeze": lambda p, h: jnp.squeeze(h[None, :, :1], (0, 2)),
    "transpose": lambda p, h: h.transpose(2, 0, 1) * jnp.arange(1.0, TIME + 1),
    "rev": lambda p, h: jnp.flip(h, 1) * jnp.arange(WIDTH),
    "pad": lambda p, h: jnp.pad(h, ((0, 0), (1, 2), (0, 0)), constant_values=0.5) ** 2,
    "slice": lambda p, h: h[:, 1::2],
    "dynamic slice": lambda p, h: jax.lax.dynamic_slice_in_dim(h, place(p), 2, axis=1),
    "dynamic update": lambda p, h: (
        jax.lax.dynamic_update_slice_in_dim(h, h[:, :2] * 2, place(p), axis=1) ** 2
    ),
    "cumulative sum": lambda p, h: jnp.cumsum(h, 1) ** 2,
    "sort": lambda p, h: jnp.sort(h, -1) * jnp.arange(WIDTH),
    "concatenate": lambda p, h: jnp.concatenate([h, 2 * h], 1) ** 2,
    "stack": lambda p, h: jnp.stack([h, h * h], 0) ** 2,
    "tile": lambda p, h: jnp.tile(h, (1, 2, 1)) ** 2,
    "matrices": lambda p, h: jnp.linalg.cholesky(drawn(h)),
    "one matrix for all": lambda p, h: jax.scipy.linalg.solve_triangular(
        jnp.tril(p["w"]) + 3 * jnp.eye(WIDTH), h.reshape(-1, WIDTH).T, lower=True
    ),
    "one system for all": lambda p, h: (
        jnp.linalg.solve(p["w"] + 3 * jnp.eye(WIDTH), h.reshape(-1, WIDTH).T) ** 2
    ),
    "window": lambda p, h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 1), (1, 1, 1), "VALID"),
    "fft": lambda p, h: jnp.abs(jnp.fft.rfft(h, axis=1)) ** 2,
}

# What is done with the examples themselves, and a part of what is said of it.
MEETINGS = {
    "rev": (lambda p, h: h * jnp.flip(h, 0), "reversed"),
    "pad": (lambda p, h: jnp.pad(h, ((1, 0), (0, 0), (0, 0)))[:-1] * h, "padding moves"),
    "slice": (lambda p, h: h[1:] * h[:-1], "cut out"),
    "dynamic slice": (lambda p, h: jax.lax.dynamic_slice_in_dim(h, place(p), 8) ** 2, "cut out"),
    "dynamic update": (
        lambda p, h: jax.lax.dynamic_update_slice_in_dim(h, jnp.ones((2, TIME, WIDTH)), place(p), 0),
        "written",
    ),
    "cumulative sum": (lambda p, h: jnp.cumsum(h, 0) ** 2, "along the examples"),
    "sort": (lambda p, h: jnp.sort(h, 0) * jnp.arange(ROWS)[:, None, None], "along the examples"),
    "matrices": (lambda p, h: jnp.linalg.cholesky(h[:, 0] @ h[:, 0].T + 9 * jnp.eye(ROWS)), "example"),
    "window": (
        lambda p, h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (2, 1, 1), (1, 1, 1), "VALID"),
        "window",
    ),
    "fft": (lambda p, h: jnp.abs(jnp.fft.rfft(h[..., 0], axis=0)) ** 2, "examples"),
}


def test_moves_of_other_dimensions_keep_values():
    def loss(p, b):
        means = {name: jnp.mean(move(p, hidden(p, b))) for name, move in MOVES.items()}
        return sum(means.values()), means

    (value, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(*arguments())
    layout = declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2)
    apply = layout.apply(loss)
    (got, got_aux), got_gradient = jax.jit(jax.value_and_grad(apply, has_aux=True))(*arguments())
    np.testing.assert_allclose(got, value, rtol=2e-6)
    for name in MOVES:
        np.testing.assert_allclose(got_aux[name], aux[name], rtol=5e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(got_gradient["w"], gradient["w"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MEETINGS)
def test_moves_of_the_examples_are_refused(name):
    move, words = MEETINGS[name]

    def loss(p, b):
        return jnp.mean(move(p, hidden(p, b)))

    with pytest.raises(UserError, match=words) as caught:
        declare(loss, *arguments(), topology="cpu:8", mesh={"data": 8}, microbatches=2)
    assert "test_moves.py:" in str(caught.value)
