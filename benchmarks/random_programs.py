"""Losses of a few random statements each, which parameters reach nearly everywhere.

A statement makes a value of those before it, by one of a table's `KINDS`: operations on each element and
along dimensions are here, those about gradients, rows and loops in the files beside. Some run inside of
something, by one of the `WRAPPERS`. To extend the grammar, add to a table; what JAX itself refuses is drawn
again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import random_gradients
import random_loops
import random_rows
from jax import lax
from random_drawn import CLASSES, ROWS, TIME, WIDTH, Drawn, Maker, Value, arrays

__all__ = ["Program", "arrays"]
# Elements of a value that goes on, and statements that are drawn until one fits.
MOST, TRIES = 1200, 30


class Program:
    """The loss that `seed` draws, of (params, batch, state) to (a number, (aux, a new state)).

    Statements that are `skipped` are constants of the shape of what they give, so that the others stay as
    they are. `lines` says what the others are, once it has run.
    """

    def __init__(self, seed: int, skipped: frozenset[int] = frozenset()) -> None:
        self.seed, self.skipped, self.lines = seed, skipped, dict[int, str]()
        self.length = random.Random(seed).randint(1, 7)

    def without(self, *more: int) -> Program:
        return Program(self.seed, self.skipped | {*more})

    def __call__(self, params: Any, batch: Any, state: Any) -> Any:
        drawn = Drawn(params, batch, state)
        for number in range(self.length):
            drawn.random, drawn.chosen = random.Random(f"{self.seed} {number}"), []
            drawn.pool.append(self._statement(drawn, number))
        drawn.random, drawn.chosen = random.Random(f"{self.seed} end"), []
        result = END[drawn.choice([*END])](drawn, drawn.pool[-2], drawn.pool[-1])
        self.lines[self.length] = f"the loss: {', '.join(drawn.chosen)}"
        made = drawn.pool[-self.length :]
        aux = [drawn.choice(_AUX)(one) for one in made if drawn.chance(0.15)]
        return result + jnp.mean(params["weights"] ** 2), (aux, self._state(drawn, state))

    def _statement(self, drawn: Drawn, number: int) -> Value:
        for _ in range(TRIES):
            drawn.chosen.clear()
            pool = drawn.pool
            x = drawn.choice(pool[-4:] if drawn.chance(0.6) else pool)
            kind = drawn.choice([*drawn.choice(GROUPS)])
            wrapper = drawn.choice([*WRAPPERS]) if drawn.chance(0.35) else None
            inside = f"{self.seed} {number} {drawn.random.random()}"

            def made(x: Value, kind: str = kind, inside: str = inside) -> Value:
                # JAX may ask for it again, later.
                drawn.random, outside = random.Random(inside), drawn.random
                try:
                    return KINDS[kind](drawn, x)
                finally:
                    drawn.random = outside

            def run(x: Value, made: Any = made, wrapper: str | None = wrapper, inside: str = inside) -> Value:
                drawn.random = random.Random(f"{inside} around")
                y = jnp.asarray(made(x) if wrapper is None else WRAPPERS[wrapper](drawn, made, x))
                return (y.real if jnp.iscomplexobj(y) else y).astype(x.dtype)

            trying = drawn.random
            try:
                shape = jax.eval_shape(run, x).shape
                if not 0 < math.prod(shape) <= MOST:
                    continue
                jax.eval_shape(jax.grad(lambda x, run=run: jnp.sum(run(x))), x)
            except REFUSED:
                continue
            finally:
                drawn.random = trying
            if number in self.skipped:
                return jnp.full(shape, 0.3)
            drawn.chosen.clear()
            y = run(x)
            place = next(n for n, one in enumerate(pool) if one is x)
            how = f" {wrapper}" if wrapper else ""
            self.lines[number] = (
                f"v{len(pool)}{list(y.shape)} = {kind}{how} of v{place}: {', '.join(drawn.chosen)}"
            )
            return y
        return drawn.pool[-1]

    @staticmethod
    def _state(drawn: Drawn, state: Any) -> Any:
        mean = drawn.like(lambda y: y.ndim > 1 and y.shape[-1] == WIDTH)
        average = 0.9 * state["average"] + 0.1 * mean.reshape(-1, WIDTH).mean(0)
        return {"average": lax.stop_gradient(average), "seen": state["seen"] + 1}


# What JAX says of what does not fit, or cannot be differentiated.
REFUSED = (
    TypeError,
    ValueError,
    IndexError,
    NotImplementedError,
    ZeroDivisionError,
    AttributeError,
    AssertionError,
)


# Operations on one value, of any shape


@jax.custom_vjp
def _own(x: Value) -> Value:
    return jnp.tanh(x)


_own.defvjp(lambda x: (_own(x), x), lambda x, g: (g * jnp.cos(x) / x.shape[0] if x.ndim else g,))


def one(drawn: Drawn, x: Value) -> Value:
    return drawn.choice(
        (
            jnp.tanh,
            jnp.sin,
            jax.nn.silu,
            jax.nn.gelu,
            jax.nn.softplus,
            jnp.square,
            jnp.abs,
            jax.nn.relu,
            lax.stop_gradient,
            _own,
            jax.jit(lambda x: jnp.cos(x) + x),
            jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
            lambda x: jnp.log1p(x * x),
            lambda x: jnp.clip(x, -0.7, 0.4),
            lambda x: jnp.where(x > 0.2, x, 0.1 * x),
        )
    )(x)


def two(drawn: Drawn, x: Value) -> Value | None:
    other = drawn.like(lambda y: y.ndim == 0 or x.shape[-y.ndim :] == y.shape)
    functions = (
        jnp.add,
        jnp.multiply,
        jnp.subtract,
        jnp.minimum,
        lambda a, b: a / (1 + b * b),
        lambda a, b: jnp.where(a < b, a, b),
    )
    return None if other is None else drawn.choice(functions)(x, other)


def scaled(drawn: Drawn, x: Value) -> Value | None:
    """Return rows by a number of each, or what leads as another value does."""
    other = drawn.like(lambda y: 0 < y.ndim < x.ndim and x.shape[: y.ndim] == y.shape)
    return None if other is None else x * other.reshape(other.shape + (1,) * (x.ndim - other.ndim))


def summed(drawn: Drawn, x: Value) -> Value:
    root = lambda x: jnp.sqrt(jnp.sum(x * x) + 1)
    return drawn.choice([jnp.mean, jnp.sum, root, jax.nn.logsumexp, jnp.max, jnp.var])(x)


def centred(drawn: Drawn, x: Value) -> Value:
    if drawn.chance(0.5):
        return x - jnp.mean(x)
    return x / (1 + jnp.sum(x * x)) if drawn.chance(0.3) else jnp.where(jnp.mean(x) > 0.1, x, -x)


# Operations along dimensions


def folded(drawn: Drawn, x: Value) -> Value:
    function = drawn.choice([jnp.sum, jnp.mean, jnp.max, jnp.min, jax.nn.logsumexp])
    return function(x, axis=drawn.axis(x), keepdims=drawn.chance(0.3))


def masked(drawn: Drawn, x: Value) -> Value | None:
    counts = drawn.batch["counts"]
    if x.shape[:2] != counts.shape:
        return None
    weights = counts.reshape(counts.shape + (1,) * (x.ndim - 2))
    axes = drawn.choice([(0, 1), (0,), (1,)])
    return jnp.sum(x * weights, axes) / (jnp.sum(weights, axes) + (drawn.chance(0.5) or 1e-3))


def product(drawn: Drawn, x: Value) -> Value | None:
    other = drawn.like(lambda y: y.ndim == 2 and y.shape[0] == x.shape[-1])
    return None if other is None or x.ndim < 2 else 0.5 * x @ other


def paired(drawn: Drawn, x: Value) -> Value | None:
    """Return products of a value with another of its kind, of each with each or along a dimension."""
    other = drawn.like(lambda y: y.shape == x.shape)
    if other is None or x.ndim not in (2, 3):
        return None
    forms = {
        2: ("ij,ij->j", "ij,ij->i", "ij,ik->jk", "ij,kj->ik"),
        3: ("ijk,ijk->ij", "itk,isk->its", "ijk,ijl->kl"),
    }
    return 0.3 * jnp.einsum(drawn.choice(forms[x.ndim]), x, other)


def turned(drawn: Drawn, x: Value) -> Value:
    return x.transpose(drawn.random.sample(range(x.ndim), x.ndim))


def regrouped(drawn: Drawn, x: Value) -> Value:
    if drawn.chance(0.3):
        axis = drawn.axis(x)
        if x.shape[axis] % 2 == 0:
            return x.reshape(
                *x.shape[:axis], *drawn.choice([(2, -1), (x.shape[axis] // 2, 2)]), *x.shape[axis + 1 :]
            )
    return x.reshape(-1, x.shape[-1]) if drawn.chance(0.5) else x.reshape(x.shape[0], -1)


def numbered(drawn: Drawn, x: Value) -> Value:
    return x * (1 + lax.broadcasted_iota(x.dtype, x.shape, drawn.axis(x))) / 4


def noisy(drawn: Drawn, x: Value) -> Value:
    key = jax.random.key(drawn.random.randrange(99))
    if drawn.chance(0.5):
        return x + 0.3 * jax.random.normal(key, x.shape)
    return jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x, 0)


def along(drawn: Drawn, x: Value) -> Value:
    functions = (
        jnp.cumsum,
        lax.cummax,
        jnp.sort,
        jnp.flip,
        jax.nn.softmax,
        jax.nn.log_softmax,
        lambda x, axis: jnp.roll(x, 1, axis),
        lambda x, axis: lax.associative_scan(jnp.add, x, axis=axis),
        lambda x, axis: x - x.mean(axis, keepdims=True),
        lambda x, axis: (x - x.mean(axis, keepdims=True)) * lax.rsqrt(x.var(axis, keepdims=True) + 0.1),
    )
    return drawn.choice(functions)(x, axis=drawn.axis(x))


def looked_up(drawn: Drawn, x: Value) -> Value | None:
    ids = drawn.batch["ids"]
    if x.ndim == 3 and x.shape[:2] == ids.shape and x.shape[2] >= CLASSES and drawn.chance(0.6):
        if drawn.chance(0.5):
            return jnp.take_along_axis(x, ids[..., None], -1)[..., 0]
        return x[jnp.arange(ROWS)[:, None], jnp.arange(TIME), ids]
    if x.shape[0] >= CLASSES and drawn.chance(0.4):
        return (
            x[ids]
            if drawn.chance(0.5)
            else jnp.tensordot(jax.nn.one_hot(ids, x.shape[0], dtype=x.dtype), x, 1)
        )
    if x.ndim < 2:
        return None
    if drawn.chance(0.5):
        return x[jnp.arange(x.shape[0]), drawn.random.randrange(x.shape[1])]
    axis = drawn.axis(x)
    return jnp.take(x, jnp.array([1, 0, 1]), axis=axis)


def written_at(drawn: Drawn, x: Value) -> Value | None:
    ids = drawn.batch["ids"]
    if x.shape[:2] == ids.shape and drawn.chance(0.7):
        return jnp.zeros((CLASSES, *x.shape[2:]), x.dtype).at[ids].add(x)
    if x.shape[0] == ROWS:
        return jax.ops.segment_sum(x, ids[:, 0], CLASSES)
    return x.at[0].set(0.5)


def spread(drawn: Drawn, x: Value) -> Value:
    axis = drawn.axis(x)
    shape = (*x.shape[:axis], drawn.choice([ROWS, TIME]), *x.shape[axis:])
    return jnp.broadcast_to(jnp.expand_dims(x, axis), shape)


def joined(drawn: Drawn, x: Value) -> Value | None:
    other = drawn.like(lambda y: y.shape == x.shape)
    axis = drawn.axis(x)
    if other is None or x.size * 2 > MOST:
        return None
    return drawn.choice(
        (
            lambda: jnp.concatenate([x, 0.5 * other], axis),
            lambda: jnp.stack([x, 0.5 * other], axis),
            lambda: jnp.repeat(x, 2, axis),
            lambda: jnp.tile(x, [1 + (d == axis) for d in range(x.ndim)]),
        )
    )()


def cut(drawn: Drawn, x: Value) -> Value:
    axis = drawn.axis(x)
    size = x.shape[axis]
    return drawn.choice(
        (
            lambda: lax.slice_in_dim(x, 0, max(1, size - 1), axis=axis),
            lambda: lax.slice_in_dim(x, 0, max(1, size // 2), axis=axis),
            lambda: lax.slice_in_dim(x, size // 2, size, axis=axis),
            lambda: lax.slice_in_dim(x, 0, size, 2, axis=axis),
            lambda: lax.index_in_dim(x, size - 1, axis, keepdims=False),
            lambda: jnp.pad(x, [(0, int(d == axis)) for d in range(x.ndim)]),
        )
    )()


def mapped(drawn: Drawn, x: Value) -> Value | None:
    """Return what a function of one row gives of each, by `vmap` or in a loop; or of a row's gradient."""
    bias = drawn.params["bias"]
    if x.shape[-1] != WIDTH or x.ndim < 2:
        return None

    def row(r: Value) -> Value:
        return jnp.sum(jnp.tanh(r * bias) ** 2)

    return drawn.choice(
        (
            lambda: jax.vmap(row)(x),
            lambda: lax.map(row, x),
            lambda: lax.map(row, x, batch_size=2),
            lambda: jax.vmap(jax.grad(row))(x),
            lambda: jax.grad(lambda x: jnp.sum(jax.vmap(row)(x)))(x),
        )
    )()


def walked(drawn: Drawn, x: Value) -> Value | None:
    """Return what a loop gives: over `x`, or over the weights, with a sum of all of `x` inside or without."""
    weights = drawn.params["weights"]
    zero = jnp.zeros(x.shape[1:], x.dtype)
    turn = jax.checkpoint(lambda c, w: (jnp.tanh(c + w.mean()), jnp.mean(c) * jnp.mean(c * c)))
    last = lambda c, row: (c + jnp.sin(row), c)
    return drawn.choice(
        (
            lambda: lax.scan(lambda c, row: (jnp.tanh(c + row), c * row), zero, x)[drawn.random.randrange(2)],
            lambda: lax.scan(last, zero, x)[0],
            lambda: lax.scan(lambda c, w: (jnp.sin(c * w.sum()), None), x, weights)[0],
            lambda: lax.scan(turn, x, weights)[1],
            lambda: lax.scan(turn, x, weights)[0],
            lambda: lax.scan(lambda c, w: (0.5 * c + x * w.sum(), jnp.sum(c)), x, weights)[1],
            lambda: lax.fori_loop(0, 3, lambda n, c: jnp.sin(c + n), x),
            lambda: lax.scan(lambda c, w: (c + jnp.sum(x) * w[0], c), 0.0, weights)[0],
        )
    )()


def convolved(drawn: Drawn, x: Value) -> Value | None:
    if x.ndim != 3 or x.shape[-1] != WIDTH:
        return None
    if drawn.chance(0.5):
        kernel = jnp.stack([drawn.params["weights"], 0.3 * drawn.params["weights"].T])
        return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 1), (1, 1, 1), "SAME")


# How a loss ends, of two values, and what it gives beside its number


def _mean_or_sum(drawn: Drawn, x: Value) -> Value:
    return jnp.mean(x) if drawn.chance(0.7) else jnp.sum(x)


END: dict[str, Callable[[Drawn, Value, Value], Value]] = {
    "both": lambda d, x, y: _mean_or_sum(d, x) + _mean_or_sum(d, y),
    "squares": lambda _, x, y: jnp.mean(x * x) + jnp.mean(y * y),
    "root": lambda _, x, y: jnp.sqrt(jnp.mean(x * x) + 0.1) + jnp.mean(y),
    "root of one": lambda _, x, y: jnp.sqrt(jnp.mean(y * y) + 0.1) + 0 * x.sum(),
    "flooded": lambda _, x, y: jnp.abs(jnp.mean(x) + jnp.mean(y) - 0.3),
    "at most": lambda _, x, y: jnp.minimum(jnp.mean(y), 0.7) + jnp.maximum(jnp.mean(x), 0.1),
    "product": lambda _, x, y: jnp.mean(x) * jnp.mean(y),
    "ratio": lambda _, x, y: jnp.sum(x) / (1 + jnp.sum(y * y)),
    "by the batch": lambda _, x, y: (
        jnp.sum(y) / ROWS + jnp.sum(x) / x.shape[0] if x.ndim else jnp.sum(y) / ROWS
    ),
    "largest": lambda _, x, y: jnp.max(x) + jnp.mean(y),
    "log of a sum": lambda _, x, y: jax.nn.logsumexp(y) + jnp.mean(x),
    "exp": lambda _, x, y: jnp.exp(jnp.mean(jnp.tanh(y))) + jnp.mean(x),
    "masked": lambda _, x, y: jnp.sum(jnp.where(y > 0, y, 0)) / jnp.maximum(jnp.sum(y > 0), 1) + jnp.mean(x),
    "a branch": lambda _, x, y: lax.cond(jnp.mean(y) > 0, lambda: jnp.mean(y), lambda: 2 * jnp.mean(x)),
    "a multiple": lambda _, x, y: 1e-3 * (jnp.mean(x) + jnp.mean(y)),
}
_AUX: tuple[Callable[[Value], Value], ...] = (
    lambda x: x,
    jnp.mean,
    jnp.sum,
    lambda x: (x > 0).sum(),
    lambda x: jnp.any(x > 1),
    lambda x: jnp.argmax(x.ravel()),
    lambda x: x.astype(jnp.int32),
    lambda x: jnp.max(x, 0) if x.ndim else x,
    lambda x: jnp.sum(x, -1) if x.ndim else x,
    lambda x: x.astype(jnp.float32).mean(),
    lambda x: jnp.sqrt(jnp.mean(x * x)),
    lambda x: jnp.all(jnp.isfinite(x)),
    lambda x: {"first": x.ravel()[0], "size": jnp.float32(x.size)},
    lambda x: jnp.mean(x > 0),
)
_KINDS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        *(one, two, scaled, summed, centred, folded, masked, product, paired, turned, regrouped, numbered),
        *(noisy, along, looked_up, written_at, spread, joined, cut, mapped, walked, convolved),
    )
}
GROUPS = (_KINDS, random_gradients.KINDS, random_rows.KINDS, random_loops.KINDS)
KINDS: dict[str, Maker] = {name: maker for group in GROUPS for name, maker in group.items()}
WRAPPERS = random_loops.WRAPPERS
