"""Loops that `jax.vmap` runs as often as each row needs, worked through in parts."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint
from meshwright.sharding import UserError, declare

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, WIDTH = 16, 4


def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {name: draws.normal(key, (WIDTH, WIDTH)) / 3 for name, key in zip("wu", keys, strict=False)}
    return params, {"x": draws.normal(keys[2], (ROWS, WIDTH)), "y": draws.normal(keys[3], (ROWS, WIDTH))}


def doubled(x):
    """Return how often a row of the data is doubled until it is large, and what it is then."""
    return jax.lax.while_loop(
        lambda c: (c[0] < 20) & (jnp.abs(c[1]).sum() < 30), lambda c: (c[0] + 1, 2 * c[1]), (0, x)
    )


def halting(p, b):
    count, last = jax.vmap(doubled)(b["x"])
    return jnp.square((b["x"] @ p["w"]) * count[:, None] / 10 + last * p["u"][0] / 30 - b["y"]).mean()


def until_still(step, start):
    return jax.lax.while_loop(
        lambda c: (c[0] < 60) & (jnp.abs(c[1] - c[2]).max() > 1e-6),
        lambda c: (c[0] + 1, step(c[1]), c[1]),
        (0, start, start + 1),
    )[1]


def layer(p, z, x):
    return jnp.tanh(z @ p["w"] + x @ p["u"])


@jax.custom_vjp
def fixed_point(p, x):
    return until_still(lambda z: layer(p, z, x), jnp.zeros_like(x))


def _forward(p, x):
    z = fixed_point(p, x)
    return z, (p, x, z)


def _backward(kept, g):
    p, x, z = kept
    through = jax.vjp(lambda z: layer(p, z, x), z)[1]
    total = until_still(lambda t: g + through(t)[0], g)
    return jax.vjp(lambda p, x: layer(p, z, x), p, x)[1](total)


fixed_point.defvjp(_forward, _backward)


def equilibrium(p, b):
    return jnp.square(jax.vmap(fixed_point, (None, 0))(p, b["x"]) - b["y"]).mean()


def each_of_several(p, b):
    """As many turns as each column of a parameter takes, the same for every row."""

    def one(w):
        most = jnp.abs(jax.lax.stop_gradient(w)).sum() * 3
        return (
            w * jax.lax.while_loop(lambda c: c[0] < most, lambda c: (c[0] + 1, c[1] * 1.1), (0.0, b["x"]))[1]
        )

    return jnp.square(jax.vmap(one)(p["w"]).mean(0) - b["y"]).mean()


def check(loss):
    rows = arguments()
    layout = declare(loss, *rows, topology="cpu:4", mesh={"data": 2, "fsdp": 2}, microbatches=2)
    value, gradient = jax.jit(jax.value_and_grad(loss))(*rows)
    got, found = jax.jit(jax.value_and_grad(layout.apply(loss)))(*rows)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, gradient)


def test_rows_that_take_turns_of_their_own():
    check(lambda p, b: halting(p, b) + each_of_several(p, b))


@pytest.mark.slow
def test_turns_within_a_gradient_of_ones_own():
    check(equilibrium)


@pytest.mark.slow
def test_a_differential_equation_for_each_row():
    def loss(p, b):
        times = jnp.array([0.0, 0.5, 1.0])

        def end(x):
            return odeint(lambda y, t, p: jnp.tanh(p["w"] @ y) * jnp.cos(t), x, times, p)[-1]

        return jnp.square(jax.vmap(end)(b["x"]) - b["y"]).mean()

    check(loss)


def test_turns_that_all_rows_decide_together_are_refused():
    def loss(p, b):
        def goes_on(c):
            return jnp.abs(c).max() < 30

        return (jax.lax.while_loop(goes_on, lambda c: 2 * c, b["x"]) @ p["w"]).mean()

    hidden = {"topology": "cpu:4", "mesh": {"data": 4}, "microbatches": 2}
    # Of the data alone it is made ahead; of a parameter it is refused.
    declare(loss, *arguments(), **hidden)
    with pytest.raises(UserError, match=r"the max over the examples is used inside .*test_turns.py:"):
        declare(lambda p, b: loss({"w": 1.0 * p["w"]}, {"x": b["x"] @ p["u"]}), *arguments(), **hidden)
