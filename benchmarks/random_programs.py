"""Losses of about ten random operations each, which parameters reach nearly everywhere.

Sizes coincide on purpose: there are as many rows as columns, and the steps of a series come in as many parts,
so that nothing can be told apart by its size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROWS, TIME, WIDTH, CLASSES = 8, 4, 8, 4
# Elements of a value that goes on.
MOST = 1200

Value = Any
Maker = Callable[["_Drawn", Value], "Value | None"]


def arrays() -> tuple[dict[str, Value], dict[str, Value]]:
    """Return parameters and a batch."""
    keys = iter(jax.random.split(jax.random.key(11), 9))

    def normal(*shape: int) -> Value:
        return 0.7 * jax.random.normal(next(keys), shape)

    params = {
        "bias": normal(WIDTH),
        "table": normal(TIME, WIDTH),
        "weights": normal(WIDTH, WIDTH),
        "scale": normal(),
    }
    batch = {
        "rows": normal(ROWS, WIDTH),
        "series": normal(ROWS, TIME, WIDTH),
        "shares": jnp.abs(normal(ROWS)),
        "ids": jax.random.randint(next(keys), (ROWS, TIME), 0, CLASSES),
        "counts": (jnp.arange(TIME) < (jnp.arange(ROWS) * 3 % (TIME + 1))[:, None]) * 1.0,
        "common": jnp.linspace(0.5, 1.5, TIME),
    }
    return params, batch


class _Drawn:
    """What a program has to draw from: random numbers, its arguments, and the values that it made so far."""

    def __init__(self, seed: int, params: dict[str, Value], batch: dict[str, Value]) -> None:
        self.random = random.Random(seed)
        self.params, self.batch = params, batch
        self.pool = [*params.values(), *(leaf for leaf in batch.values() if leaf.dtype != jnp.int32)]
        self.pool = [one for one in self.pool if jnp.issubdtype(one.dtype, jnp.inexact)]
        self.pool.append(jnp.tanh(batch["rows"] @ params["weights"] + params["bias"]))
        self.pool.append(jnp.sin(batch["series"] @ params["weights"]))
        self.pool.append(batch["shares"] * (batch["rows"] @ params["bias"]))
        self.pool.append(params["table"][batch["ids"]] * params["scale"])

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def choice(self, options: Any) -> Any:
        return self.random.choice(options)

    def axis(self, x: Value) -> int:
        return self.random.randrange(x.ndim)

    def like(self, fits: Callable[[Value], bool]) -> Value | None:
        found = [one for one in self.pool if fits(one)]
        return self.choice(found) if found else None


def program(seed: int) -> Callable[[Any, Any], Any]:
    """Return the loss that `seed` draws, of (params, batch) to (a number, a list of arrays)."""

    def loss(params: Any, batch: Any) -> Any:
        drawn = _Drawn(seed, params, batch)
        pool = drawn.pool
        for _ in range(drawn.random.randint(5, 12)):
            x = drawn.choice(pool[-6:] if drawn.chance(0.6) else pool)
            kind = drawn.choice(_KINDS)
            y = kind(drawn, x) if x.ndim or kind in _OF_NUMBERS else None
            if y is not None and y.size <= MOST:
                pool.append(y)
        result = sum(jnp.mean(one) if drawn.chance(0.7) else jnp.sum(one) for one in pool[-3:])
        aux = [one for one in pool[-2:] if drawn.chance(0.3)]
        return result + jnp.mean(params["weights"] ** 2), aux

    return loss


# Operations on one value, of any shape


@jax.custom_vjp
def _own(x: Value) -> Value:
    return jnp.tanh(x)


_own.defvjp(lambda x: (_own(x), x), lambda x, g: (g * jnp.cos(x) / x.shape[0] if x.ndim else g,))


def one(drawn: _Drawn, x: Value) -> Value:
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


def two(drawn: _Drawn, x: Value) -> Value | None:
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


def scaled(drawn: _Drawn, x: Value) -> Value | None:
    """Return rows by a number of each, or what leads as another value does."""
    other = drawn.like(lambda y: 0 < y.ndim < x.ndim and x.shape[: y.ndim] == y.shape)
    return None if other is None else x * other.reshape(other.shape + (1,) * (x.ndim - other.ndim))


def summed(drawn: _Drawn, x: Value) -> Value:
    root = lambda x: jnp.sqrt(jnp.sum(x * x) + 1)
    return drawn.choice([jnp.mean, jnp.sum, root, jax.nn.logsumexp, jnp.max, jnp.var])(x)


def branched(_: _Drawn, x: Value) -> Value:
    return lax.cond(jnp.sum(x) > 0, lambda x: jnp.sin(x), lambda x: 2 * x, x)


def centred(drawn: _Drawn, x: Value) -> Value:
    if drawn.chance(0.5):
        return x - jnp.mean(x)
    return x / (1 + jnp.sum(x * x)) if drawn.chance(0.3) else jnp.where(jnp.mean(x) > 0.1, x, -x)


# Operations along dimensions


def folded(drawn: _Drawn, x: Value) -> Value:
    function = drawn.choice([jnp.sum, jnp.mean, jnp.max, jnp.min, jax.nn.logsumexp])
    return function(x, axis=drawn.axis(x), keepdims=drawn.chance(0.3))


def masked(drawn: _Drawn, x: Value) -> Value | None:
    counts = drawn.batch["counts"]
    if x.shape[:2] != counts.shape:
        return None
    weights = counts.reshape(counts.shape + (1,) * (x.ndim - 2))
    axes = drawn.choice([(0, 1), (0,), (1,)])
    return jnp.sum(x * weights, axes) / (jnp.sum(weights, axes) + (drawn.chance(0.5) or 1e-3))


def product(drawn: _Drawn, x: Value) -> Value | None:
    other = drawn.like(lambda y: y.ndim == 2 and y.shape[0] == x.shape[-1])
    return None if other is None or x.ndim < 2 else 0.5 * x @ other


def paired(drawn: _Drawn, x: Value) -> Value | None:
    """Return products of a value with another of its kind, of each with each or along a dimension."""
    other = drawn.like(lambda y: y.shape == x.shape)
    if other is None or x.ndim not in (2, 3):
        return None
    forms = {
        2: ("ij,ij->j", "ij,ij->i", "ij,ik->jk", "ij,kj->ik"),
        3: ("ijk,ijk->ij", "itk,isk->its", "ijk,ijl->kl"),
    }
    return 0.3 * jnp.einsum(drawn.choice(forms[x.ndim]), x, other)


def turned(drawn: _Drawn, x: Value) -> Value:
    return x.transpose(drawn.random.sample(range(x.ndim), x.ndim))


def regrouped(drawn: _Drawn, x: Value) -> Value:
    if drawn.chance(0.3):
        axis = drawn.axis(x)
        if x.shape[axis] % 2 == 0:
            return x.reshape(
                *x.shape[:axis], *drawn.choice([(2, -1), (x.shape[axis] // 2, 2)]), *x.shape[axis + 1 :]
            )
    return x.reshape(-1, x.shape[-1]) if drawn.chance(0.5) else x.reshape(x.shape[0], -1)


def numbered(drawn: _Drawn, x: Value) -> Value:
    return x * (1 + lax.broadcasted_iota(x.dtype, x.shape, drawn.axis(x))) / 4


def noisy(drawn: _Drawn, x: Value) -> Value:
    key = jax.random.key(drawn.random.randrange(99))
    if drawn.chance(0.5):
        return x + 0.3 * jax.random.normal(key, x.shape)
    return jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x, 0)


def along(drawn: _Drawn, x: Value) -> Value:
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


def looked_up(drawn: _Drawn, x: Value) -> Value | None:
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


def written(drawn: _Drawn, x: Value) -> Value | None:
    ids = drawn.batch["ids"]
    if x.shape[:2] == ids.shape and drawn.chance(0.7):
        return jnp.zeros((CLASSES, *x.shape[2:]), x.dtype).at[ids].add(x)
    if x.shape[0] == ROWS:
        return jax.ops.segment_sum(x, ids[:, 0], CLASSES)
    return x.at[0].set(0.5)


def spread(drawn: _Drawn, x: Value) -> Value:
    axis = drawn.axis(x)
    shape = (*x.shape[:axis], drawn.choice([ROWS, TIME]), *x.shape[axis:])
    return jnp.broadcast_to(jnp.expand_dims(x, axis), shape)


def joined(drawn: _Drawn, x: Value) -> Value | None:
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


def cut(drawn: _Drawn, x: Value) -> Value:
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


def mapped(drawn: _Drawn, x: Value) -> Value | None:
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


def walked(drawn: _Drawn, x: Value) -> Value | None:
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


def convolved(drawn: _Drawn, x: Value) -> Value | None:
    if x.ndim != 3 or x.shape[-1] != WIDTH:
        return None
    if drawn.chance(0.5):
        kernel = jnp.stack([drawn.params["weights"], 0.3 * drawn.params["weights"].T])
        return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 1), (1, 1, 1), "SAME")


_OF_NUMBERS = (one, two, summed, branched, centred)
_KINDS: tuple[Maker, ...] = (
    *(one, two, two, two, scaled, summed, branched, centred, folded, folded, masked, product, product),
    *(paired, turned, regrouped, numbered, noisy, along, looked_up, written, spread, joined, cut),
    *(mapped, walked, convolved),
)
