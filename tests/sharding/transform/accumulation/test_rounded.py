"""Gradients that are clipped or rounded on their way back, of what each part has its own of and of all."""

from __future__ import annotations

import functools

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding import UserError, declare, plan

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

ROWS, WIDTH, PARTS = 32, 8, 4


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": draws.normal(keys[0], (WIDTH, WIDTH)) / 3}
    return params, {"x": draws.normal(keys[1], (ROWS, WIDTH)), "y": draws.normal(keys[2], (ROWS, WIDTH))}


def declared(loss, params=None, **named):
    own, batch = arguments()
    params = own if params is None else params
    return declare(loss, params, batch, topology="cpu:8", mesh={"data": 8}, microbatches=PARTS, **named)


def check(loss, params=None):
    own, batch = arguments()
    params = own if params is None else params
    want = jax.jit(jax.value_and_grad(loss))(params, batch)
    got = jax.jit(jax.value_and_grad(declared(loss, params).apply(loss)))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def through(backward):
    """Return what gives its operand on, and `backward` of its gradient."""

    @jax.custom_vjp
    def same(w):
        return w

    same.defvjp(lambda w: (w, None), lambda _, g: (backward(g),))
    return same


clipped = through(lambda g: jnp.clip(g, -1e-3, 1e-3))
in_few_bits = through(lambda g: jax.lax.reduce_precision(g, 5, 2))


def squares(h, b):
    return jnp.square(h - b["y"]).mean()


@pytest.mark.parametrize(
    "own",
    [
        lambda h: clipped(h),
        lambda h: in_few_bits(h),
        lambda h: h.astype(jnp.float8_e4m3fn).astype(h.dtype),
        lambda h: jax.lax.scan(lambda h, _: (clipped(jnp.tanh(h)), None), h, None, length=2)[0],
    ],
    ids=["clipped", "in few bits", "float8", "clipped in a loop"],
)
@pytest.mark.parametrize(
    "whole",
    [jnp.sqrt, lambda mean: jnp.exp(3 * mean), lambda mean: jnp.abs(mean - 0.5)],
    ids=["root", "exp", "flooding"],
)
def test_what_comes_back_to_each_example_is_the_whole_loss_s_before_it_is_rounded(own, whole):
    """A function of one mean was differentiated as if it were the mean, and its gradient multiplied after."""
    check(lambda p, b: whole(squares(own(b["x"] @ p["w"]), b)))


def test_a_written_gradient_that_rounds_to_few_bits_is_not_made_of_shares():
    with pytest.raises(UserError, match=r"is not linear in what comes back .*, at .*test_rounded.py:"):
        declared(lambda p, b: squares(b["x"] @ in_few_bits(p["w"]), b))


def derived(value, tangent):
    @jax.custom_jvp
    def own(w):
        return value(w)

    own.defjvp(lambda at, moves: (own(*at), tangent(*moves)))
    return own


def coarse(w):
    return w.astype(jnp.float8_e4m3fn).astype(w.dtype)


def test_a_written_derivative_that_rounds_is_not_made_of_shares_and_one_that_does_not_is():
    """Weights rounded as they go ahead, and not as their gradient comes back, were refused."""
    rounded, passed = derived(lambda w: w, coarse), derived(coarse, lambda t: t)
    check(lambda p, b: squares(b["x"] @ passed(p["w"]), b))
    with pytest.raises(UserError, match=r"rounds what comes back.* each part's share, at .*test_rounded.py:"):
        declared(lambda p, b: squares(b["x"] @ rounded(p["w"]), b))


def test_parameters_of_coarse_floats_are_read_in_parts_and_not_trained():
    own, batch = arguments()
    params = {"w": own["w"].astype(jnp.float8_e4m3fn), "v": own["w"][0]}

    def loss(p, b):
        return squares(b["x"] @ p["w"].astype(jnp.float32) + p["v"], b)

    kept = plan(loss, params, batch, topology="cpu:8", mesh={"data": 8}, microbatches=PARTS, trainable="v")
    got = jax.jit(jax.grad(kept.apply(loss)))(params, batch)["v"]
    np.testing.assert_allclose(got, jax.jit(jax.grad(loss))(params, batch)["v"], rtol=1e-4)
    with pytest.raises(UserError, match=r"a parameter of float8_e4m3fn is rounded to that.*wider type"):
        plan(loss, params, batch, topology="cpu:8", mesh={"data": 8}, microbatches=PARTS)
    with pytest.raises(UserError, match="a parameter of float8_e4m3fn is rounded to that"):
        declared(loss, params)


def test_a_sum_that_is_rounded_to_coarse_floats_inside_of_a_checkpoint_is_complete_first():
    def loss(p, b):
        def inside(w, x):
            h = x @ w
            return h, coarse(jax.lax.stop_gradient(jnp.square(h).sum(0)))

        h, total = jax.checkpoint(inside)(p["w"], b["x"])
        return squares(h, b) + total.sum()

    check(loss)


def test_a_multiple_of_a_planned_loss_is_rounded_as_a_multiple():
    """In an own loop: the gradient was taken of the loss, and multiplied after it was clipped."""
    params, batch = arguments()

    def loss(p, b):
        return squares(clipped(b["x"] @ p["w"]), b)

    def in_halves(p, b):
        h = b["x"].astype(jnp.float16) @ p["w"].astype(jnp.float16)
        return 1e-6 * jnp.square(h - b["y"]).mean()

    for one, times in ((loss, 0.1), (in_halves, 1e5)):
        own, planned = (
            jax.jit(jax.value_and_grad(lambda p, of=of, times=times: times * of(p, batch)))(params)
            for of in (one, declared(one).apply(one))
        )
        np.testing.assert_allclose(planned[0], own[0], rtol=1e-3)
        np.testing.assert_allclose(planned[1]["w"], own[1]["w"], rtol=1e-2, atol=2e-5)


@pytest.mark.parametrize("inside", [False, True], ids=["in the open", "in a loop"])
def test_float16_gradients_below_a_function_of_one_mean_are_scaled_before_they_are_nothing(inside):
    """They were taken of the mean, in float16 nothing, and multiplied after."""

    def halves(x, w):
        return (x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(x.dtype)

    def loss(p, b):
        h = halves(b["x"], p["w"])
        if inside:
            h, _ = jax.lax.scan(lambda h, _: (halves(h, p["w"]), None), b["x"], None, length=2)
        return 1e5 * jnp.sqrt(1e-10 * squares(h, b))

    params, batch = arguments()
    want, got = (jax.jit(jax.grad(one))(params, batch)["w"] for one in (loss, declared(loss).apply(loss)))
    assert np.abs(want).min() > 0
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2 * np.abs(want).max())


def test_a_multiple_of_a_loss_in_stages_is_rounded_as_a_multiple():
    keys = jax.random.split(jax.random.key(1), 4)
    params = {"w": jnp.stack([draws.normal(key, (WIDTH, WIDTH)) / 3 for key in keys])}
    batch = arguments()[1]

    def loss(dtype, own, p, b):
        h, _ = jax.lax.scan(
            lambda h, w: (jnp.tanh(own(h @ w)), None), b["x"].astype(dtype), p["w"].astype(dtype)
        )
        return 1e-6 * squares(h, b)

    for dtype, own in ((jnp.float32, clipped), (jnp.float16, lambda h: h)):
        one = functools.partial(loss, dtype, own)
        named = {"mesh": {"stage": 2}, "microbatches": 2, "names": {"w": ("layers", "embed", "mlp")}}
        staged = declare(one, params, batch, topology="cpu:2", **named).apply(one)
        want, got = (
            jax.jit(jax.grad(lambda p, of=of: 1e5 * of(p, batch)))(params)["w"] for of in (one, staged)
        )
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=5e-3 * np.abs(want).max())
