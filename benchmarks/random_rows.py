"""Random statements about rows: reduced, sorted, looked up, written, drawn, named, solved.

Each of a table is a function of an array with two dimensions or more; JAX's own exception draws another.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from random_drawn import CLASSES, ROWS, TIME, WIDTH, Drawn, Maker, Value

OVER_ROWS: dict[str, Callable[[Value], Value]] = {
    "largest": lambda x: jnp.max(x, 0),
    "least, at most 0": lambda x: jnp.min(x, 0, initial=0.0),
    "largest, from -inf": lambda x: jnp.max(x, 0, initial=-jnp.inf, where=x > 0.2),
    "largest magnitude": lambda x: jnp.max(jnp.abs(x)),
    "product": lambda x: jnp.prod(jnp.tanh(x), 0),
    "norm": lambda x: jnp.linalg.norm(x, axis=0),
    "norm of all": lambda x: jnp.linalg.norm(x.ravel()),
    "norm to infinity": lambda x: jnp.linalg.norm(x.ravel(), jnp.inf),
    "variance": lambda x: jnp.var(x, 0, ddof=1),
    "deviation": lambda x: jnp.std(x, 0),
    "any": lambda x: jnp.any(x > 1, 0) * 1.0,
    "all": lambda x: jnp.all(x > -1, 0) * 1.0,
    "count": lambda x: jnp.count_nonzero(x > 0, 0) / ROWS,
    "count of all": lambda x: jnp.mean(x > 0),
    "log of a sum": lambda x: jax.nn.logsumexp(x, 0),
    "log of a weighted sum": lambda x: jax.nn.logsumexp(x, 0, b=jnp.abs(x) + 0.1),
    "mean where positive": lambda x: jnp.mean(x, 0, where=x > 0),
    "sum where above the mean": lambda x: jnp.sum(x, where=x > jnp.mean(x)),
    "mean by the rows' number": lambda x: jnp.sum(x, 0) / ROWS,
    "mean by its shape": lambda x: jnp.sum(x, 0) / x.shape[0],
    "mean of positive": lambda x: jnp.sum(jax.nn.relu(x)) / jnp.maximum(jnp.sum(x > 0), 1),
    "sum of signs": lambda x: jnp.sum(jnp.sign(x).astype(jnp.int8)) * 0.1,
    "exclusive or": lambda x: lax.reduce_xor((x > 0).astype(jnp.int32), (0,)) * 1.0,
    "or of bits": lambda x: lax.reduce_or((10 * jnp.abs(x)).astype(jnp.int32), (0,)) * 1.0,
    "by a function": lambda x: lax.reduce(x, 0.0, lambda a, b: a + b, (0,)),
    "mean without nan": lambda x: jnp.nanmean(jnp.where(x > 0.5, jnp.nan, x), 0),
    "middle": lambda x: jnp.median(x, 0),
    "place of the largest": lambda x: jnp.argmax(x, 0) * 1.0,
    "ratio of sums": lambda x: jnp.sum(x, 0) / (1 + jnp.sum(x * x, 0)),
    "product with itself": lambda x: x.reshape(x.shape[0], -1).T @ x.reshape(x.shape[0], -1) / ROWS,
    "determinant of that": lambda x: jnp.linalg.slogdet(
        x.reshape(x.shape[0], -1)[:, :4].T @ x.reshape(x.shape[0], -1)[:, :4] + jnp.eye(4)
    )[1],
    "smooth largest": lambda x: jnp.sum(x * jax.nn.softmax(x, 0), 0),
    "of the first": lambda x: x[0],
    "of the last": lambda x: x[-1],
    "of the rows' weights": lambda x: jnp.average(x, 0, weights=jnp.arange(1.0, x.shape[0] + 1)),
}
BESIDE_ROWS: dict[str, Callable[[Value], Value]] = {
    "centred": lambda x: x - jnp.mean(x, 0),
    "normed": lambda x: (x - jnp.mean(x, 0)) / jnp.sqrt(jnp.var(x, 0) + 0.1),
    "in units of the norm": lambda x: x / jnp.maximum(jnp.linalg.norm(x), 1e-3),
    "in units of the largest": lambda x: x / (jnp.max(jnp.abs(x), 0) + 0.1),
    "from the largest": lambda x: jnp.exp(x - lax.stop_gradient(jnp.max(x))),
    "clipped at the mean": lambda x: jnp.minimum(x, jnp.mean(x)),
    "clipped at a deviation": lambda x: jnp.clip(x, -jnp.std(x), jnp.std(x)),
    "where below the largest": lambda x: jnp.where(x < jnp.max(x, 0), x, 0.5),
    "where any is large": lambda x: jnp.where(jnp.any(x > 1), x, 0.5 * x),
    "by its number": lambda x: x * (jnp.arange(x.shape[0]).reshape(-1, *[1] * (x.ndim - 1)) + 1) / 8,
    "but for the first": lambda x: jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) > 0, x, 0),
    "every other": lambda x: x * (lax.broadcasted_iota(jnp.int32, x.shape, 0) % 2),
    "around": lambda x: jnp.roll(x, 1, -1),
    "around the rows": lambda x: jnp.roll(x, 1, 0),
    "turned around": lambda x: x[::-1],
    "halves swapped": lambda x: jnp.concatenate([x[ROWS // 2 :], x[: ROWS // 2]]),
    "pairs": lambda x: x.reshape(2, -1, *x.shape[1:]).mean(0),
    "pairs of neighbours": lambda x: (
        x.reshape(-1, 2, *x.shape[1:])[:, 0] * x.reshape(-1, 2, *x.shape[1:])[:, 1]
    ),
    "differences": lambda x: jnp.diff(x, axis=-1),
    "differences of rows": lambda x: jnp.diff(x, axis=0),
    "padded by its edge": lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 1)], "edge"),
    "padded rows": lambda x: jnp.pad(x, [(1, 1)] + [(0, 0)] * (x.ndim - 1), "reflect"),
    "lower triangle": lambda x: jnp.tril(x),
    "outer": lambda x: x[..., :, None] * x[..., None, :2],
    "spectrum": lambda x: jnp.abs(jnp.fft.rfft(x, axis=-1)) ** 2,
    "spectrum of rows": lambda x: jnp.fft.fft(x, axis=0).real,
    "turned in the plane": lambda x: jnp.imag(jnp.exp(1j * x) * (1 + 0.5j)),
    "by a complex mean": lambda x: jnp.abs(x + 1j * jnp.mean(x)),
    "with everything": lambda x: jnp.concatenate([x, jnp.broadcast_to(x.mean(0), x.shape)], -1),
    "over the rest": lambda x: (jnp.sum(x, 0) - x) / (x.shape[0] - 1),
    "run up": lambda x: jnp.cumsum(x, -1),
    "largest so far": lambda x: lax.cummax(x, x.ndim - 1),
    "log of the sum so far": lambda x: lax.cumlogsumexp(x, x.ndim - 1),
    "softmax of rows": lambda x: jax.nn.softmax(x, 0),
    "standard": lambda x: jax.nn.standardize(x, -1),
    "gated": lambda x: jax.nn.glu(x),
    "attention": lambda x: jax.nn.softmax(x @ jnp.swapaxes(x, -1, -2)) @ x,
}
SORTED: dict[str, Callable[[Value], Value]] = {
    "sorted": lambda x: jnp.sort(x, -1),
    "by their order": lambda x: jnp.take_along_axis(x, jnp.argsort(x, -1), -1),
    "ranked": lambda x: jnp.argsort(jnp.argsort(x, -1), -1) * x,
    "two largest": lambda x: lax.top_k(x, 2)[0],
    "places of two": lambda x: lax.top_k(x, 2)[1] * lax.top_k(x, 2)[0],
    "beyond the second": lambda x: jnp.where(x >= lax.top_k(x, 2)[0][..., -1:], x, 0),
    "rows by their sums": lambda x: x[jnp.argsort(x.reshape(x.shape[0], -1).sum(1))],
    "rows there and back": lambda x: x[jnp.argsort(x.reshape(x.shape[0], -1)[:, 0])][
        jnp.argsort(jnp.argsort(x.reshape(x.shape[0], -1)[:, 0]))
    ],
    "hardest two rows": lambda x: lax.top_k(x.reshape(x.shape[0], -1).sum(1), 2)[0],
    "among bounds": lambda x: x * jnp.searchsorted(jnp.array([-0.5, 0.0, 0.5]), x),
    "among its own": lambda x: x * jnp.searchsorted(jnp.sort(x.ravel()), 0.2),
    "in boxes": lambda x: jnp.histogram(x, bins=4, range=(-2, 2))[0] * 1.0,
    "digits": lambda x: jnp.digitize(x, jnp.array([-0.5, 0.5])) * x,
    "between points": lambda x: jnp.interp(x, jnp.linspace(-2, 2, 5), jnp.array([0.0, 1, 3, 2, 1])),
    "a quantile": lambda x: jnp.quantile(x, 0.3, axis=-1),
    "hottest": lambda x: x * jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1]),
}


def over_rows(drawn: Drawn, x: Value) -> Value:
    return drawn.choice([*OVER_ROWS.values()])(x)


def beside_rows(drawn: Drawn, x: Value) -> Value:
    return drawn.choice([*BESIDE_ROWS.values()])(x)


def in_order(drawn: Drawn, x: Value) -> Value:
    return drawn.choice([*SORTED.values()])(x)


def by_class(drawn: Drawn, x: Value) -> Value | None:
    """Return what is added, read or written at places that the batch or the values say."""
    ids, labels = drawn.batch["ids"], drawn.batch["ids"][:, 0]
    if x.shape[0] != ROWS:
        return None
    chosen = jnp.argmax(x.reshape(ROWS, -1)[:, :CLASSES], -1)
    of_class = jnp.zeros((CLASSES, *x.shape[1:]))
    return drawn.choice(
        (
            lambda: jax.ops.segment_sum(x, labels, CLASSES),
            lambda: jax.ops.segment_max(x, labels, CLASSES),
            lambda: jax.ops.segment_sum(x, labels, CLASSES)[labels],
            lambda: jax.ops.segment_sum(x, chosen, CLASSES),
            lambda: x - (of_class.at[labels].add(x) / of_class.at[labels].add(1).clip(1))[labels],
            lambda: of_class.at[labels].set(x),
            lambda: of_class.at[labels].max(x),
            lambda: (of_class + 1).at[labels].multiply(x),
            lambda: of_class.at[chosen].min(x),
            lambda: x.at[:, 0].set(1.0),
            lambda: x.at[jnp.arange(ROWS), labels].add(1.0),
            lambda: x.at[jnp.arange(ROWS), labels].set(0.0),
            lambda: x.at[0].add(1.0),
            lambda: x.at[labels].add(0.1),
            lambda: jnp.take_along_axis(x, ids.reshape(ROWS, TIME, *[1] * (x.ndim - 2)), 1),
            lambda: x[labels],
            lambda: jax.vmap(lambda r, n: lax.dynamic_slice_in_dim(r, n, 2))(x, labels),
            lambda: jax.vmap(lambda r, n: lax.dynamic_update_slice_in_dim(r, 0 * r[:2], n, 0))(x, labels),
            lambda: jax.vmap(lambda r, n: jnp.roll(r, n, 0))(x, labels),
            lambda: lax.dynamic_slice_in_dim(x, 1, 2),
            lambda: lax.dynamic_index_in_dim(x, drawn.state["seen"], 1),
            lambda: jnp.bincount(labels, length=CLASSES) * 0.1,
            lambda: x * jnp.bincount(labels, length=CLASSES)[labels].reshape(ROWS, *[1] * (x.ndim - 1)),
            lambda: (
                jnp.where(labels.reshape(ROWS, *[1] * (x.ndim - 1)) == 1, x, 0).sum(0)
                / jnp.maximum(1, (labels == 1).sum())
            ),
            lambda: x * (labels[:, None] == labels).sum(1).reshape(ROWS, *[1] * (x.ndim - 1)),
        )
    )()


def random_rows(drawn: Drawn, x: Value) -> Value | None:
    """Return `x` with draws, by one key or by each row's own."""
    key, keys, shape = drawn.batch["key"], drawn.batch["keys"], x.shape
    own = jax.random.split(key, x.shape[0])
    stop = lax.stop_gradient
    options: list[Callable[[], Value]] = [
        lambda: x + jax.random.normal(key, shape),
        lambda: x * jax.random.bernoulli(key, 0.7, shape),
        lambda: x * jax.random.bernoulli(key, jax.nn.sigmoid(stop(x))),
        lambda: x + jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(own),
        lambda: x[jax.random.permutation(key, x.shape[0])],
        lambda: jax.random.permutation(key, x, axis=0),
        lambda: x + jax.random.gumbel(key, shape),
        lambda: x * jax.nn.one_hot(jax.random.categorical(key, stop(x)), shape[-1]),
        lambda: x + jax.random.truncated_normal(key, -1, 1, shape),
        lambda: x * jax.random.randint(key, shape, 0, 3),
        lambda: x * jax.random.uniform(key, shape[-1:]),
        lambda: x * jax.random.uniform(key, (shape[0], *[1] * (x.ndim - 1))),
        lambda: x * jax.random.gamma(key, 2.0, shape[-1:]),
        lambda: x * jax.random.gamma(key, 2.0, shape),
        lambda: x * jax.random.uniform(jax.random.fold_in(key, 7), shape),
        lambda: (
            x
            + jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(key, n), shape[1:]))(
                jnp.arange(x.shape[0])
            )
        ),
        lambda: jnp.where(jax.random.uniform(key, shape) < jnp.mean(stop(x)), x, 0),
        lambda: x * jax.random.choice(key, drawn.params["bias"], shape),
        lambda: x * jax.random.beta(key, 0.4, 0.4),
        lambda: x * jax.random.rademacher(key, shape, x.dtype),
        lambda: x @ jax.random.orthogonal(key, x.shape[-1]),
    ]
    if x.shape[0] == ROWS:
        options += [
            lambda: x + jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(keys),
            lambda: jax.vmap(lambda k, r: r * jax.random.bernoulli(k, 0.5))(keys, x),
            lambda: jax.vmap(lambda k, r: jax.random.permutation(k, r, axis=0))(keys, x),
            lambda: x + jax.random.normal(keys[0], shape),
            lambda: jax.vmap(lambda k, r: r + jax.random.normal(jax.random.split(k)[1], r.shape))(keys, x),
        ]
    return drawn.choice(options)()


def named(drawn: Drawn, x: Value) -> Value:
    """Return what functions of each row give that know of the others by the axis' name."""
    own = lambda function: jax.vmap(function, axis_name="all")(x)
    n = x.shape[0]
    return drawn.choice(
        (
            lambda: own(lambda r: r - lax.pmean(r, "all")),
            lambda: own(lambda r: r / (1 + lax.psum(r * r, "all"))),
            lambda: own(lambda r: r * lax.pmax(lax.stop_gradient(r), "all")),
            lambda: own(lambda r: r * lax.axis_index("all")),
            lambda: own(lambda r: r * lax.psum(1, "all")),
            lambda: own(lambda r: lax.all_gather(r, "all").mean(0) - r),
            lambda: own(lambda r: lax.ppermute(r, "all", [(i, (i + 1) % n) for i in range(n)])),
            lambda: jax.vmap(lambda r: lax.pmean(r, "all"), axis_name="all", out_axes=None)(x),
            lambda: jax.vmap(lambda r, b: r * b - lax.pmean(r, "all"), (0, None), axis_name="all")(
                x, x.mean(0)
            ),
            lambda: jax.vmap(lambda r: r - lax.pmean(r, "all"), in_axes=1, out_axes=1, axis_name="all")(x),
            lambda: jax.vmap(jax.grad(lambda r: lax.pmean(jnp.sum(r * r), "all")), axis_name="all")(x),
        )
    )()


def solved(drawn: Drawn, x: Value) -> Value | None:
    """Return what linear algebra gives of each row's matrix, of one matrix, or of all rows'."""
    weights = drawn.params["weights"]
    if x.shape[-1] != WIDTH:
        return None
    shared = weights @ weights.T + 3 * jnp.eye(WIDTH)
    each = x[..., :, None] * x[..., None, :] + 3 * jnp.eye(WIDTH)
    rows = x.reshape(-1, WIDTH)
    return drawn.choice(
        (
            lambda: jnp.linalg.solve(shared, x[..., None])[..., 0],
            lambda: jnp.linalg.solve(each, jnp.broadcast_to(drawn.params["bias"], x.shape)[..., None])[
                ..., 0
            ],
            lambda: jnp.linalg.inv(each).sum(-1),
            lambda: jnp.linalg.cholesky(each).sum(-1),
            lambda: jnp.linalg.slogdet(each)[1],
            lambda: jnp.linalg.eigvalsh(each),
            lambda: x @ jnp.linalg.inv(shared),
            lambda: x @ jnp.linalg.cholesky(shared),
            lambda: jax.scipy.linalg.solve_triangular(shared, rows.T, lower=True).T,
            lambda: jnp.linalg.solve(rows.T @ rows + jnp.eye(WIDTH), drawn.params["bias"]),
            lambda: x @ jnp.linalg.solve(rows.T @ rows / ROWS + jnp.eye(WIDTH), weights),
            lambda: jnp.linalg.qr(each)[1].sum(-1),
            lambda: jnp.linalg.det(each),
        )
    )()


KINDS: dict[str, Maker] = {
    "over rows": over_rows,
    "beside rows": beside_rows,
    "in order": in_order,
    "by class": by_class,
    "random rows": random_rows,
    "named": named,
    "solved": solved,
}
