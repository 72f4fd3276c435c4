"""Random statements about gradients: written, clipped, rounded, stopped, taken inside of the loss."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import linear_call
from random_drawn import WIDTH, Drawn, Maker, Value

# What comes back to a function, of what was kept and what comes back to its result.
BACKWARD: dict[str, Callable[[Value, Value], Value]] = {
    "clipped": lambda _, g: jnp.clip(g, -1e-3, 1e-3),
    "clipped by norm": lambda _, g: g / jnp.maximum(1, 50 * jnp.linalg.norm(g.ravel())),
    "clipped by each row's norm": lambda _, g: g / jnp.maximum(1, 50 * jnp.abs(g).sum(-1, keepdims=True)),
    "its sign": lambda _, g: 0.01 * jnp.sign(g),
    "rounded": lambda _, g: jnp.round(g * 64) / 64,
    "in whole numbers": lambda _, g: (g * 1000).astype(jnp.int32) / 1000,
    "in few bits": lambda _, g: lax.reduce_precision(g, 5, 2),
    "in float8": lambda _, g: g.astype(jnp.float8_e5m2).astype(g.dtype),
    "scaled": lambda _, g: 0.3 * g,
    "reversed": lambda _, g: -g,
    "by size": lambda x, g: g * 3 / x.size,
    "by rows": lambda x, g: g / x.shape[0],
    "of what was kept": lambda x, g: g * jnp.cos(x),
    "of a sum that was kept": lambda x, g: g * jnp.sum(x * x),
    "of a mean that was kept": lambda x, g: g * jnp.mean(x, 0),
    "of the largest that was kept": lambda x, g: g * jnp.max(x),
    "where large": lambda x, g: jnp.where(x > 0.3, g, 0),
    "where the mean is": lambda x, g: jnp.where(jnp.mean(x) > 0, g, 2 * g),
    "centred": lambda _, g: g - jnp.mean(g),
    "centred over the first": lambda _, g: g - jnp.mean(g, 0),
    "centred over the last": lambda _, g: g - jnp.mean(g, -1, keepdims=True),
    "run up": lambda _, g: jnp.cumsum(g, -1),
    "turned around": lambda _, g: g[::-1],
    "none": lambda _, g: jnp.zeros_like(g),
    "one": lambda _, g: 0.01 * jnp.ones_like(g),
    "what was kept alone": lambda x, _: 0.01 * x,
    "plus a number": lambda _, g: g + 1e-3,
    "squared": lambda _, g: g * g,
    "finite": lambda _, g: jnp.nan_to_num(g),
    "where finite": lambda _, g: jnp.where(jnp.isfinite(g), g, 0),
    "where any is": lambda _, g: jnp.where(jnp.any(jnp.abs(g) > 1e-3), g, 0),
    "largest alone": lambda _, g: jnp.where(jnp.abs(g) == jnp.max(jnp.abs(g)), g, 0),
    "dropped": lambda _, g: jnp.where(jax.random.bernoulli(jax.random.key(3), 0.6, g.shape), g, 0),
    "with noise": lambda _, g: g + 1e-3 * jax.random.normal(jax.random.key(4), g.shape),
    "by a loop": lambda _, g: lax.fori_loop(0, 3, lambda _, g: 0.5 * g, g),
    "by a clipping loop": lambda _, g: lax.scan(lambda g, _: (jnp.clip(g, -1e-3, 1e-3), None), g, length=2)[
        0
    ],
    "by a branch on it": lambda _, g: lax.cond(g.sum() > 0, lambda g: g, lambda g: 2 * g, g),
    "by a branch on what was kept": lambda x, g: lax.cond(x.sum() > 0, lambda g: g, lambda g: 2 * g, g),
}
FORWARD: dict[str, Callable[[Value], Value]] = {
    "same": lambda x: x,
    "tanh": jnp.tanh,
    "doubled": lambda x: 2 * x,
    "rounded": lambda x: jnp.round(x * 8) / 8,
    "centred": lambda x: x - jnp.mean(x),
    "sign": jnp.sign,
}


def own(
    forward: Callable[[Value], Value], backward: Callable[[Value, Value], Value]
) -> Callable[[Value], Value]:
    """Return a function whose gradient is written."""

    @jax.custom_vjp
    def function(x: Value) -> Value:
        return forward(x)

    function.defvjp(lambda x: (forward(x), x), lambda x, g: (backward(x, g),))
    return function


def written(drawn: Drawn, x: Value) -> Value:
    return own(drawn.choice([*FORWARD.values()]), drawn.choice([*BACKWARD.values()]))(x)


def written_of_two(drawn: Drawn, x: Value) -> Value | None:
    """Return a product whose gradients are written, one plain and one not."""
    other, backward = drawn.fitting(x), drawn.choice([*BACKWARD.values()])
    if other is None or other.shape != x.shape:
        return None
    first = drawn.chance(0.5)

    @jax.custom_vjp
    def function(x: Value, y: Value) -> Value:
        return x * y

    def back(kept: Value, g: Value) -> Value:
        x, y = kept
        return (backward(x, g * y), g * x) if first else (g * y, backward(y, g * x))

    function.defvjp(lambda x, y: (x * y, (x, y)), back)
    return function(x, other)


def written_with_two_results(drawn: Drawn, x: Value) -> Value:
    backward = drawn.choice([*BACKWARD.values()])

    @jax.custom_vjp
    def function(x: Value) -> Value:
        return x, jnp.mean(x)

    function.defvjp(lambda x: ((x, jnp.mean(x)), x), lambda x, g: (backward(x, g[0]) + g[1] / x.size,))
    y, mean = function(x)
    return y * mean if drawn.chance(0.5) else y + mean


def derived(drawn: Drawn, x: Value) -> Value:
    """Return a function whose derivative is written."""
    rules = (
        lambda x, t: t * jnp.cos(x),
        lambda _, t: 0.3 * t,
        lambda x, t: t * jnp.mean(x),
        lambda x, t: t / x.size,
        lambda _, t: t - jnp.mean(t, 0),
        lambda _, t: t * 0,
        lambda _, t: t.astype(jnp.float8_e4m3fn).astype(t.dtype),
        lambda _, t: lax.reduce_precision(t, 5, 2),
        lambda x, t: jnp.where(x > 0, t, 0),
        lambda _, t: jnp.sum(t) + 0 * t,
    )
    rule = drawn.choice(rules)
    function = jax.custom_jvp(drawn.choice([*FORWARD.values()]))
    function.defjvp(lambda at, moves: (function(*at), rule(*at, *moves)))
    return function(x)


def transposed(drawn: Drawn, x: Value) -> Value:
    backward = drawn.choice([*BACKWARD.values()])
    return (
        linear_call(lambda _, x: 2 * x, backward, x, x)
        if drawn.chance(0.3)
        else linear_call(lambda _, x: x, lambda _, g: backward(g, g), (), x)
    )


def straight_through(drawn: Drawn, x: Value) -> Value:
    coarse = drawn.choice(
        (
            lambda x: jnp.round(4 * x) / 4,
            jnp.sign,
            jnp.floor,
            lambda x: x.astype(jnp.float8_e4m3fn).astype(x.dtype),
            lambda x: jnp.round(x / jnp.max(jnp.abs(x)) * 7),
            lambda x: (x > jnp.mean(x)) * 1.0,
            lambda x: jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1]),
        )
    )
    return x + lax.stop_gradient(coarse(x) - x)


def stopped(drawn: Drawn, x: Value) -> Value:
    stop = lax.stop_gradient
    return drawn.choice(
        (
            lambda: x - stop(jnp.mean(x)),
            lambda: stop(x) * jnp.mean(x),
            lambda: x / (0.1 + stop(jnp.sqrt(jnp.sum(x * x)))),
            lambda: x * stop(jnp.max(x)),
            lambda: (x - stop(x.mean(0))) / jnp.sqrt(0.1 + stop(x.var(0))),
            lambda: jnp.where(stop(x) > jnp.mean(x), x, 0),
            lambda: stop(x) + 0.1 * (x - stop(x)),
            lambda: x * jax.nn.softmax(stop(x), -1),
        )
    )()


def cast(drawn: Drawn, x: Value) -> Value:
    """Return `x` through another type and back; through whole numbers and coarse floats as they round."""
    stop = lax.stop_gradient
    return drawn.choice(
        (
            lambda: x.astype(jnp.float8_e4m3fn).astype(x.dtype),
            lambda: stop(x.astype(jnp.bfloat16)).astype(x.dtype),
            lambda: x * stop(jnp.sum(x.astype(jnp.float16))).astype(x.dtype),
            lambda: x * (10 * x).astype(jnp.int32),
            lambda: x * jnp.sum((10 * x).astype(jnp.int8)) / 10,
            lambda: x + (x > 0).sum(0),
            lambda: x * jnp.mean((4 * x).astype(jnp.int32)),
            lambda: lax.reduce_precision(x, 5, 2),
            lambda: x * lax.reduce_precision(stop(jnp.sum(x)), 5, 2),
            lambda: jnp.round(x * 4) * x,
            lambda: jnp.floor(jnp.sum(x)) * x,
            lambda: jnp.sign(jnp.mean(x)) * x,
            lambda: x * lax.population_count(jnp.abs(10 * x).astype(jnp.uint8)).astype(x.dtype),
            lambda: (
                lax.bitcast_convert_type(lax.bitcast_convert_type(stop(x), jnp.int64) | 1, jnp.float64) * x
            ),
        )
    )()


def differentiated(drawn: Drawn, x: Value) -> Value | None:
    """Return what derivatives inside of the loss give."""
    bias, weights = drawn.params["bias"], drawn.params["weights"]
    if x.shape[-1:] != (WIDTH,):
        return None
    row = lambda r: jnp.sum(jnp.tanh(r * bias) ** 2)
    whole = lambda x: jnp.sum(jnp.tanh(x * bias) ** 2)
    own_weights = lambda w: jnp.mean(jnp.tanh(x @ w) ** 2)
    return drawn.choice(
        (
            lambda: jax.grad(whole)(x),
            lambda: jax.grad(lambda x: jnp.sqrt(whole(x)))(x),
            lambda: x @ (weights - 0.1 * jax.grad(own_weights)(weights)),
            lambda: x @ (weights - 0.1 * jax.checkpoint(jax.grad(own_weights))(weights)),
            lambda: (
                x @ lax.scan(lambda w, _: (w - 0.1 * jax.grad(own_weights)(w), None), weights, length=2)[0]
            ),
            lambda: jax.jvp(lambda x: jnp.tanh(x) * x, (x,), (jnp.ones_like(x),))[1],
            lambda: jax.jvp(own_weights, (weights,), (weights,))[1],
            lambda: jax.vjp(jnp.sin, x)[1](x)[0],
            lambda: jax.linearize(jnp.sin, x)[1](x),
            lambda: jax.vmap(jax.grad(row))(x.reshape(-1, WIDTH)),
            lambda: jax.vmap(jax.hessian(row))(x.reshape(-1, WIDTH)).sum(-1),
            lambda: jax.vmap(jax.jacfwd(lambda r: jnp.tanh(r * bias)))(x.reshape(-1, WIDTH)).sum(-1),
            lambda: jax.jvp(jax.grad(whole), (x,), (x,))[1],
            lambda: jax.grad(lambda b: jnp.sum(jnp.sin(x * b)))(bias),
            lambda: jnp.linalg.norm(jax.grad(own_weights)(weights)),
        )
    )()


def held(drawn: Drawn, x: Value) -> Value:
    """Return `x` through what only says something to the compiler."""
    other = drawn.like(lambda y: y.shape == x.shape)
    return drawn.choice(
        (
            lambda: lax.optimization_barrier(x),
            lambda: lax.optimization_barrier((x, other))[0] * 1.1,
            lambda: jnp.max(lax.optimization_barrier(x), 0),
            lambda: lax.optimization_barrier(jnp.max(x, 0)),
            lambda: lax.optimization_barrier(jnp.max(x)) * x,
            lambda: jax.device_put(x),
            lambda: jax.device_put(jnp.max(x)) * x,
            lambda: jnp.copy(jnp.sum(x, 0)),
            lambda: jax.named_call(jnp.sin, name="sine")(x),
        )
    )()


KINDS: dict[str, Maker] = {
    "written": written,
    "written of two": written_of_two,
    "written with two results": written_with_two_results,
    "derived": derived,
    "transposed": transposed,
    "straight through": straight_through,
    "stopped": stopped,
    "cast": cast,
    "differentiated": differentiated,
    "held": held,
}
