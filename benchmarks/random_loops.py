"""Random statements that loop and branch, and ways to run any statement: in a loop, checkpoint or branch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from random_drawn import ROWS, TIME, WIDTH, Drawn, Maker, Value, Wrapper
from random_gradients import BACKWARD, own

_POLICIES = jax.checkpoint_policies


def over_rows(drawn: Drawn, x: Value) -> Value | None:
    """Return what a loop gives that takes the rows one after another."""
    bias, stop = drawn.params["bias"], lax.stop_gradient
    zero = jnp.zeros(x.shape[1:], x.dtype)
    scan = lambda turn, start, xs=x, **more: lax.scan(turn, start, xs, **more)
    back = own(lambda c: c, drawn.choice([*BACKWARD.values()]))
    which = drawn.random.randrange(2)
    return drawn.choice(
        (
            lambda: scan(lambda c, r: (c + r, r * 2), zero)[which],
            lambda: scan(lambda c, r: (c + r, c), zero, reverse=True)[which],
            lambda: scan(lambda c, r: (jnp.maximum(c, r), r), zero)[0],
            lambda: scan(lambda c, r: (c + jnp.where(r > 0, r, 0), (r > 0).sum()), zero)[which] * 1.0,
            lambda: scan(lambda c, r: ((c[0] + r, c[1] + 1), r), (zero, 0))[0][0] / ROWS,
            lambda: (lambda c: c[0] / c[1])(scan(lambda c, r: ((c[0] + r, c[1] + 1), None), (zero, 0))[0]),
            lambda: scan(lambda c, r: (back(c) + r, None), zero)[0],
            lambda: scan(lambda c, r: (c + back(r), None), zero)[0],
            lambda: scan(lambda c, r: (c, jnp.sin(c * r)), zero + 0.3)[which],
            lambda: scan(lambda c, r: (r, c), zero)[which],
            lambda: scan(lambda c, r: (0.9 * c + 0.1 * r, None), zero)[0],
            lambda: scan(lambda c, r: (c, r * bias if r.shape[-1:] == bias.shape else r), 0.0, unroll=2)[1],
            lambda: lax.map(lambda r: jnp.sin(r), x, batch_size=2),
            lambda: lax.map(jax.checkpoint(lambda r: jnp.sin(r).sum()), x),
            lambda: scan(lambda c, r: (c + r.mean(0), r.sum(0)), zero, x.reshape(2, -1, *x.shape[1:]))[which],
            lambda: scan(
                lambda c, r: (c + jnp.square(r).mean(0), None), zero, x.reshape(-1, 2, *x.shape[1:])
            )[0],
            lambda: lax.fori_loop(0, x.shape[0], lambda n, c: c + x[n], zero),
            lambda: lax.fori_loop(0, x.shape[0], lambda n, c: c.at[n].multiply(0.5), x),
            lambda: scan(lambda c, n: (c + x[n], x[n]), zero, jnp.arange(x.shape[0]))[which],
            lambda: scan(lambda c, n: (c.at[n].set(2 * x[n]), None), 0 * x, jnp.arange(x.shape[0]))[0],
            lambda: lax.while_loop(
                lambda c: c[0] < x.shape[0], lambda c: (c[0] + 1, c[1] + stop(x)[c[0]]), (0, zero)
            )[1],
            lambda: lax.associative_scan(lambda a, b: a + b, x),
            lambda: lax.associative_scan(jnp.multiply, jnp.tanh(x), axis=-1),
            lambda: scan(lambda c, r: (c | jnp.any(r > 1), None), False)[0] * jnp.mean(x),
            lambda: scan(lambda c, r: (c + (r > 0).sum(), c), 0)[which] * jnp.mean(x),
        )
    )()


def over_time(drawn: Drawn, x: Value) -> Value | None:
    """Return what a loop over other dimensions gives, or over layers, with what all rows share inside."""
    weights, table, stop = drawn.params["weights"], drawn.params["table"], lax.stop_gradient
    if x.shape[-1] != WIDTH or x.ndim < 2:
        return None
    back = own(lambda w: w, drawn.choice([*BACKWARD.values()]))
    which = drawn.random.randrange(2)
    steps = jnp.moveaxis(x, 1, 0) if x.ndim > 2 else jnp.stack([x, 0.5 * x])
    zero = jnp.zeros(steps.shape[1:])
    layers = jnp.stack([weights, weights.T, 0.5 * weights])
    return drawn.choice(
        (
            lambda: lax.scan(lambda c, s: (jnp.tanh(c @ weights + s), c), zero, steps)[which],
            lambda: lax.scan(lambda c, s: (jnp.tanh(c @ back(weights) + s), c), zero, steps)[which],
            lambda: lax.scan(lambda c, s: (back(c) + s, c.mean()), zero, steps)[which],
            lambda: lax.scan(lambda c, w: (jnp.tanh(c @ w), jnp.mean(c)), x, layers)[which],
            lambda: (
                lax.scan(lambda c, w: (jnp.tanh(c @ w), back(w)), x, layers)[1].sum(0) @ drawn.params["bias"]
            ),
            lambda: x @ lax.scan(lambda w, _: (back(w), w.sum()), weights, None, length=2)[0],
            lambda: lax.scan(lambda c, w: ((c[0] @ c[1], back(c[1])), c[1].sum()), (x, weights), layers)[0][
                0
            ],
            lambda: lax.scan(
                lambda c, w: ((jnp.tanh(c[0] @ w), c[1] + c[0].mean(0)), None),
                (x, 0 * drawn.params["bias"]),
                layers,
            )[0][which],
            lambda: lax.scan(lambda c, w: (jnp.tanh(c @ w) - c.mean(0), c.max()), x, layers)[which],
            lambda: lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ back(w)), (c * c).sum())), x, layers)[
                which
            ],
            lambda: lax.scan(lambda c, w: (c @ w / (1 + jnp.abs(c).max()), None), x, layers)[0],
            lambda: lax.fori_loop(0, 2, lambda n, c: jnp.sin(c + table[n]), x),
            lambda: (
                lax.fori_loop(0, 2, lambda _, w: w - 0.1 * (w @ w.T @ w), weights) @ x.reshape(-1, WIDTH).T
            ),
            lambda: x * lax.while_loop(lambda c: c < 3, lambda c: 2 * c + 0.1, stop(jnp.abs(jnp.mean(x)))),
            lambda: (
                jax.vmap(lambda r: lax.while_loop(lambda c: c.max() < 3, lambda c: 2 * c + 1, stop(r)))(x) * x
            ),
            lambda: lax.scan(lambda c, s: (c + s.sum(), s - s.mean()), 0.0, steps)[which],
            lambda: lax.scan(lambda c, s: (jnp.maximum(c, s), None), zero, steps)[0],
            lambda: lax.scan(lambda c, s: (c, jnp.where(c.sum() > 0, s, 0)), zero, steps)[1],
            lambda: lax.scan(
                lambda c, s: (c * 0.5 + s, lax.cond(s.sum() > 0, jnp.sin, jnp.cos, s)), zero, steps
            )[1],
            lambda: lax.scan(
                lambda k, s: (jax.random.split(k)[0], s + jax.random.normal(k, s.shape)),
                drawn.batch["key"],
                steps,
            )[1],
            lambda: lax.scan(
                lambda c, w: (c - 0.1 * jax.grad(lambda c: jnp.mean((c @ w) ** 2))(c), None), x, layers
            )[0],
        )
    )()


def branched(drawn: Drawn, x: Value) -> Value | None:
    """Return one of some branches, by what is known, drawn, counted, summed, or each row's own."""
    labels, stop = drawn.batch["ids"][:, 0], lax.stop_gradient
    back = own(lambda c: c, drawn.choice([*BACKWARD.values()]))
    arms = [lambda x: jnp.sin(x), lambda x: 2 * x, lambda x: back(x), lambda x: x - x.mean()]
    first, other = drawn.choice(arms), drawn.choice(arms)
    pick = lambda test: lax.cond(test, first, other, x)
    options = [
        lambda: pick(jnp.mean(x) > 0),
        lambda: pick(jnp.any(x > 1.5)),
        lambda: pick(drawn.state["seen"] > 2),
        lambda: pick(drawn.batch["counts"].sum() > 12),
        lambda: pick(jax.random.bernoulli(drawn.batch["key"])),
        lambda: pick(jnp.max(stop(x)) > 1),
        lambda: pick(drawn.params["scale"] > 0),
        lambda: lax.switch(drawn.batch["ids"].sum() % 3, [first, other, lambda x: x], x),
        lambda: lax.cond(jnp.mean(x) > 0, lambda x: x.sum(0), lambda x: x[0], x),
        lambda: lax.cond(x.shape[0] > 3, lambda x: x.sum(0), lambda x: x.max(0), x),
        lambda: jnp.where(jnp.isfinite(jnp.sum(x)), x, 0),
        lambda: jnp.where(jnp.sum(x) > 0, x, stop(x)),
        lambda: lax.select_n((x > 0).astype(jnp.int32), x, 2 * x),
    ]
    if x.shape[0] == ROWS:
        options += [
            lambda: jax.vmap(lambda n, r: lax.switch(n, [jnp.sin, jnp.cos, lambda r: 2 * r], r))(labels, x),
            lambda: jax.vmap(lambda n, r: lax.cond(n > 1, lambda r: back(r), lambda r: 0.5 * r, r))(
                labels, x
            ),
            lambda: jax.vmap(lambda n, r: lax.fori_loop(0, n, lambda _, c: 0.5 * c, stop(r)))(labels, x) * x,
        ]
    return drawn.choice(options)()


# Ways to run a function of a value


def _checkpointed(drawn: Drawn, function: Callable[[Value], Value], x: Value) -> Value:
    policy = drawn.choice(
        (None, _POLICIES.dots_saveable, _POLICIES.everything_saveable, _POLICIES.nothing_saveable)
    )
    return jax.checkpoint(function, policy=policy)(x)


def _by_branch(drawn: Drawn, function: Callable[[Value], Value], x: Value) -> Value:
    test = drawn.choice((drawn.params["scale"] > -9, drawn.batch["ids"].sum() > 0, jnp.sum(x) > -99))
    return lax.cond(test, function, lambda x: 0.5 * function(x), x)


def _in_a_loop(drawn: Drawn, function: Callable[[Value], Value], x: Value) -> Value:
    if drawn.chance(0.5):
        # What each turn gives of what does not change, beside something carried.
        return lax.scan(lambda c, n: (c + n, function(x) * (1 + n)), 0.0, jnp.arange(2.0))[1].sum(0)
    return lax.scan(lambda c, _: (function(c), None), x, None, length=2)[0]


def _by_row(drawn: Drawn, function: Callable[[Value], Value], x: Value) -> Value:
    del drawn
    return jax.vmap(function)(x)


def _by_row_in_a_loop(drawn: Drawn, function: Callable[[Value], Value], x: Value) -> Value:
    return lax.map(function, x, batch_size=drawn.choice((None, 2)))


def _by_column(drawn: Drawn, function: Callable[[Value], Value], x: Value) -> Value:
    axis = drawn.random.randrange(1, max(x.ndim, 2))
    return jax.vmap(function, in_axes=axis, out_axes=drawn.choice((0, -1)))(x)


def _with_a_gradient(drawn: Drawn, function: Callable[[Value], Value], x: Value) -> Value:
    before, after = (own(lambda x: x, drawn.choice([*BACKWARD.values()])) for _ in range(2))
    return after(function(before(x)))


WRAPPERS: dict[str, Wrapper] = {
    "jitted": lambda _, function, x: jax.jit(function)(x),
    "checkpointed": _checkpointed,
    "by a branch": _by_branch,
    "in a loop": _in_a_loop,
    "by row": _by_row,
    "by row in a loop": _by_row_in_a_loop,
    "by column": _by_column,
    "with a gradient": _with_a_gradient,
    "its derivative": lambda _, function, x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1],
    "its gradient": lambda _, function, x: jax.grad(lambda x: jnp.sum(function(x) ** 2))(x),
    "of what is turned": lambda _, function, x: function(jnp.swapaxes(x, 0, -1)),
    "of the steps first": lambda _, function, x: function(jnp.moveaxis(x, 0, 1)),
    "of merged rows": lambda _, function, x: function(x.reshape(-1, x.shape[-1])),
    "behind a barrier": lambda _, function, x: lax.optimization_barrier(
        function(lax.optimization_barrier(x))
    ),
    "of groups": lambda _, function, x: jax.vmap(function)(x.reshape(TIME, -1, *x.shape[1:])),
}
KINDS: dict[str, Maker] = {"over rows in turn": over_rows, "over time": over_time, "branched": branched}
