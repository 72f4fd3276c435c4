"""Losses of the kinds that people write, over one tree of parameters and one batch; see `accumulation`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

# As many rows as columns on purpose: nothing may be told apart by its size.
ROWS, TIME, WIDTH, HIDDEN, CLASSES, WORDS = 32, 4, 32, 8, 5, 11
_HELPERS = {"params", "batch", "losses", "hidden", "row", "logits", "token"}


def params() -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(2), 12))

    def normal(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape) * 0.3

    return {
        "bias": normal(HIDDEN),
        "filter": normal(3, WIDTH, HIDDEN),
        "head": normal(HIDDEN, CLASSES),
        "inside": normal(WIDTH, HIDDEN),
        "layers": normal(3, HIDDEN, HIDDEN),
        "scale": jnp.asarray(0.7),
        "square": normal(WIDTH, WIDTH),
        "state": normal(HIDDEN, HIDDEN),
        "words": normal(WORDS, WIDTH),
        "places": normal(TIME, WIDTH),
        "own": normal(ROWS, WIDTH),
    }


def batch() -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(3), 8))
    lengths = np.arange(ROWS) * 7 % (TIME + 1)
    return {
        "class": jnp.arange(ROWS) * 3 % CLASSES,
        "classes": jax.random.randint(next(keys), (ROWS, TIME), 0, CLASSES),
        "counts": jnp.asarray((np.arange(TIME) < lengths[:, None]) * 1.0),
        "lengths": jnp.asarray(lengths),
        "matrix": jax.random.normal(next(keys), (ROWS, 3, 3)) * 0.2,
        "other": jax.random.normal(next(keys), (ROWS, WIDTH)),
        "series": jax.random.normal(next(keys), (ROWS, TIME, WIDTH)),
        "share": jnp.abs(jax.random.normal(next(keys), (ROWS,))) + 0.1,
        "words": jax.random.randint(next(keys), (ROWS, TIME), 0, WORDS),
        "x": jax.random.normal(next(keys), (ROWS, WIDTH)),
    }


def losses(module: Any) -> dict[str, Callable[[Any, Any], Any]]:
    """Return name → loss of a module."""
    found = inspect.getmembers(module, inspect.isfunction)
    return {
        name: one
        for name, one in found
        if one.__module__ == module.__name__ and not name.startswith("_") and name not in _HELPERS
    }


def hidden(p, b):
    return jnp.tanh(b["x"] @ p["inside"] + p["bias"])


def row(p, b):
    return optax.softmax_cross_entropy_with_integer_labels(hidden(p, b) @ p["head"], b["class"])


def logits(p, b):
    return jax.nn.gelu(b["series"] @ p["inside"] + p["bias"]) @ p["head"]


def token(p, b):
    return optax.softmax_cross_entropy_with_integer_labels(logits(p, b), b["classes"])


def mean_of_rows(p, b):
    return row(p, b).mean()


def sum_of_rows(p, b):
    return row(p, b).sum()


def sum_over_rows_as_a_number(p, b):
    return row(p, b).sum() / 32


def mean_and_decay(p, b):
    return row(p, b).mean() + 0.1 * jnp.sum(p["inside"] ** 2)


def rows_in_the_formula(p, b):
    return row(p, b).sum() / b["x"].shape[0] ** 0.5 + len(b["x"]) * p["scale"] ** 2


def counted_tokens(p, b):
    return (token(p, b) * b["counts"]).sum() / jnp.maximum(b["counts"].sum(), 1)


def counted_tokens_of_each_row(p, b):
    return ((token(p, b) * b["counts"]).sum(1) / (b["counts"].sum(1) + 1)).mean()


def mean_where(p, b):
    return jnp.mean(token(p, b), where=b["counts"] > 0)


def statistics_over_a_named_axis(p, b):
    def one(x):
        h = jnp.tanh(x @ p["inside"])
        away = h - lax.pmean(h, "rows")
        return jnp.square(away).sum() / (1 + lax.pmax(jnp.abs(x), "rows").sum())

    return jax.vmap(one, axis_name="rows")(b["x"]).mean()


def average_by_weight(p, b):
    return jnp.average(row(p, b), weights=b["share"])


def two_counts(p, b):
    return counted_tokens(p, b) + average_by_weight(p, b)


def mean_beside_counted(p, b):
    return mean_of_rows(p, b) + counted_tokens(p, b)


def weights_that_divide_nothing(p, b):
    return (row(p, b) * b["share"]).sum() / ROWS


def weights_of_one(p, b):
    return (row(p, b) * b["share"] / b["share"].sum()).sum()


def standardised_weights(p, b):
    return (row(p, b) * (b["share"] - b["share"].mean()) / b["share"].std()).mean()


def ratio(p, b):
    return row(p, b).sum() / jnp.abs(hidden(p, b)).sum()


def flood(p, b):
    return jnp.abs(row(p, b).mean() - 1.5) + 1.5


def floor_of_a_mean(p, b):
    return jnp.maximum(row(p, b).mean(), 0.4) + jnp.clip(hidden(p, b).mean(), -0.01, 0.01)


def log_of_a_mean(p, b):
    return jnp.log(jnp.mean(row(p, b) ** 2))


def length_of_a_complex_sum(p, b):
    return jnp.abs(jnp.sum(jnp.exp(1j * row(p, b))))


def exp_of_a_mean(p, b):
    return jnp.exp(row(p, b).mean())


def root_of_a_mean(p, b):
    return jnp.sqrt(row(p, b).mean())


def free_bits_of_units(p, b):
    return jnp.maximum(jnp.mean(hidden(p, b) ** 2, 0), 0.2).sum() + row(p, b).mean()


def norm_of_all(p, b):
    return jnp.linalg.norm(hidden(p, b) - 0.2)


def product_of_two_means(p, b):
    return row(p, b).mean() * hidden(p, b).mean()


def log_sum_exp(p, b):
    return jax.nn.logsumexp(row(p, b))


def worst_row(p, b):
    return row(p, b).max()


def variance(p, b):
    return jnp.var(row(p, b))


def focal(p, b):
    return optax.sigmoid_focal_loss(hidden(p, b) @ p["head"], jax.nn.one_hot(b["class"], CLASSES)).mean()


def huber(p, b):
    return optax.huber_loss(hidden(p, b).sum(-1), b["share"]).mean()


def smoothed(p, b):
    return optax.softmax_cross_entropy(
        hidden(p, b) @ p["head"], optax.smooth_labels(jax.nn.one_hot(b["class"], CLASSES), 0.1)
    ).mean()


def picked_by_row_number(p, b):
    return -jax.nn.log_softmax(hidden(p, b) @ p["head"])[jnp.arange(ROWS), b["class"]].mean()


def picked_by_row_and_place(p, b):
    return -jax.nn.log_softmax(logits(p, b))[jnp.arange(ROWS)[:, None], jnp.arange(TIME), b["classes"]].mean()


def row_numbers(p, b):
    return (row(p, b) * jnp.arange(ROWS)).mean()


def constant_of_rows(p, b):
    return (row(p, b) * np.linspace(0, 1, ROWS)).mean()


def first_half_counts_more(p, b):
    return jnp.where(jnp.arange(ROWS) < ROWS // 2, row(p, b), 0.1 * row(p, b)).mean()


def transposed_noise(p, b):
    return (hidden(p, b) * jax.random.uniform(jax.random.key(4), (HIDDEN, ROWS)).T).mean()


def noise_of_an_old_key(p, b):
    return ((hidden(p, b) + jax.random.normal(jax.random.PRNGKey(1), (ROWS, HIDDEN))) ** 2).mean()


def keys_of_rows(p, b):
    return (
        hidden(p, b)
        * jax.vmap(lambda k: jax.random.normal(k, (HIDDEN,)))(jax.random.split(jax.random.key(5), ROWS))
    ).mean()


def keys_folded(p, b):
    return (
        row(p, b)
        * jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(jax.random.key(6), i)))(jnp.arange(ROWS))
    ).mean()


def looked_up_words(p, b):
    return jnp.mean(jnp.tanh(p["words"][b["words"]] @ p["inside"]) ** 2)


def parameters_of_rows(p, b):
    return jnp.mean((b["x"] * p["own"]) ** 2) + p["own"].mean()


def sorted_inside_of_rows(p, b):
    return jnp.mean(jnp.sort(hidden(p, b), -1)[:, :2]) + lax.top_k(hidden(p, b), 2)[0].mean()


def rows_mapped(p, b):
    return jnp.mean(lax.map(lambda x: jnp.sum(jnp.tanh(x @ p["inside"])), b["x"]) ** 2)


def rows_vmapped(p, b):
    return jax.vmap(lambda x, n: -jax.nn.log_softmax(x @ p["inside"] @ p["head"])[n])(
        b["x"], b["class"]
    ).mean()


def rows_walked_and_summed(p, b):
    return jnp.sqrt(
        1 + lax.scan(lambda s, x: (s + jnp.sum(jnp.tanh(x @ p["inside"]) ** 2), None), 0.0, b["x"])[0]
    )


def time_first(p, b):
    return jnp.mean(
        jnp.tanh(b["series"].swapaxes(0, 1).reshape(TIME * ROWS, WIDTH) @ p["inside"])
        .reshape(TIME, ROWS, HIDDEN)
        .sum(0)
        ** 2
    )


def heads_first(p, b):
    return jnp.mean(jnp.einsum("btd,dh->htb", b["series"], p["inside"]) ** 2)


def straight_through(p, b):
    return jnp.mean((hidden(p, b) + lax.stop_gradient(jnp.round(hidden(p, b)) - hidden(p, b))) ** 2)


def divided_by_a_fixed_spread(p, b):
    return row(p, b).mean() / lax.stop_gradient(jnp.std(b["x"]))


def divided_by_its_own_size(p, b):
    return row(p, b).mean() / lax.stop_gradient(row(p, b).mean())


def branch_on_a_mean(p, b):
    return lax.cond(row(p, b).mean() > 1.5, lambda m: m**2, lambda m: 3 * m, row(p, b).mean())


def branch_over_rows(p, b):
    return lax.cond(row(p, b).mean() > 1.5, lambda v: (v**2).mean(), lambda v: v.mean(), row(p, b))


def choice_on_a_mean(p, b):
    return jnp.where(row(p, b).mean() > 1.6, row(p, b).sum(), jnp.sqrt(row(p, b).mean()))


def covariance(p, b):
    return jnp.sum((hidden(p, b).T @ hidden(p, b) / ROWS - jnp.eye(HIDDEN)) ** 2)


def energy_of_a_gradient(p, b):
    return jnp.mean(
        (
            jnp.linalg.norm(jax.vmap(jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["inside"]))))(b["x"]), axis=-1)
            - 1
        )
        ** 2
    )


def gradient_penalty(p, b):
    return row(p, b).mean() + jnp.sum(
        jax.grad(lambda w: jnp.mean(jnp.tanh(b["x"] @ w) ** 2))(p["inside"]) ** 2
    )


def spectra(p, b):
    return jnp.mean(jnp.abs(jnp.fft.rfft(b["series"] @ p["inside"], axis=1) * jnp.exp(1j * p["scale"])) ** 2)


def solved_systems(p, b):
    return jnp.mean(jnp.linalg.solve(jnp.eye(3) + p["scale"] * b["matrix"], b["matrix"][..., :1]) ** 2)


def determinants(p, b):
    return jnp.mean(jnp.linalg.slogdet(jnp.eye(3) + 0.1 * p["scale"] * b["matrix"])[1])


def writes_into_rows(p, b):
    return jnp.mean(hidden(p, b).at[jnp.arange(ROWS), b["class"]].set(0.5) ** 2) + jnp.mean(
        hidden(p, b).at[:, 1].multiply(2.0)
    )


def positions(p, b):
    return (
        token(p, b) * (lax.broadcasted_iota(jnp.int32, (ROWS, TIME), 1) < b["lengths"][:, None])
    ).sum() / b["lengths"].sum()


def triplets(p, b):
    return jax.nn.relu(
        1
        + ((hidden(p, b) - p["bias"]) ** 2).sum(-1)
        - ((hidden(p, b) - b["other"] @ p["inside"]) ** 2).sum(-1)
    ).mean()


def segments_of_classes(p, b):
    return jnp.sum(
        (
            jax.ops.segment_sum(hidden(p, b), b["class"], CLASSES)
            / (1 + jnp.bincount(b["class"], length=CLASSES)[:, None])
        )
        ** 2
    )


def every_kind_of_aux(p, b):
    return row(p, b).mean(), {
        "right": (logits(p, b).argmax(-1) == b["classes"]).sum(),
        "row": row(p, b),
        "any": jnp.any(row(p, b) > 2),
        "spread": jnp.std(row(p, b)),
        "n": ROWS,
    }


def median_beside(p, b):
    return row(p, b).mean(), [jnp.median(row(p, b)), b["counts"].sum(dtype=int)]


def all_beside_all(p, b):
    return -jnp.diag(jax.nn.log_softmax(hidden(p, b) @ (b["other"] @ p["inside"]).T)).mean()


def pairs_of_scores(p, b):
    return jax.nn.relu(1 - (hidden(p, b)[:, :1] - hidden(p, b)[:, :1].T)).mean()


def sorted_rows(p, b):
    return jnp.sort(row(p, b))[: ROWS // 2].mean()


def hardest_rows(p, b):
    return lax.top_k(row(p, b), 3)[0].mean()


def median_row(p, b):
    return jnp.median(row(p, b))


def next_row(p, b):
    return jnp.mean((row(p, b)[1:] - row(p, b)[:-1]) ** 2)


def rolled_rows(p, b):
    return jax.nn.relu(hidden(p, b) - jnp.roll(hidden(p, b), 1, 0)).mean()


def two_halves(p, b):
    return row(p, b)[: ROWS // 2].mean() + 2 * row(p, b)[ROWS // 2 :].mean()


def mixed_up_rows(p, b):
    return jnp.mean(
        (0.7 * b["x"] + 0.3 * b["x"][jax.random.permutation(jax.random.key(2), ROWS)]) @ p["inside"]
    )


def running_sum(p, b):
    return jnp.mean(jnp.cumsum(row(p, b)) ** 2)


def state_along_rows(p, b):
    return lax.scan(lambda s, x: (0.9 * s + jnp.sum(x @ p["inside"]), None), 0.0, b["x"])[0]


def softmax_of_rows(p, b):
    return jnp.sum(jax.nn.softmax(hidden(p, b)[:, 0]) * row(p, b))
