"""Softmaxes of attention in the ways that people write them, and weights that are none.

Arrays are those of `attention_ways`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from attention_ways import WIDTH, Way, causal, kept, masked, repeated


def projected(x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries, and keys and values with as many heads, each a product of its array."""
    turn = x["bias"][0, :WIDTH, :WIDTH]
    query, key, value = (one @ turn for one in repeated(x))
    return query, key, value


def scored(x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return scores ``[batch, heads, rows, columns]``, and values."""
    query, key, value = repeated(x)
    return jnp.einsum("bqhd,bkhd->bhqk", query, key) * WIDTH**-0.5, value


def hidden_from_the_softmax(
    visible: Callable[[dict[str, jax.Array]], jax.Array],
    bias: Callable[[dict[str, jax.Array]], Any] = lambda x: 0.0,
) -> Way:
    """Return attention whose softmax is told `where`: a query that sees nothing gets zeros."""

    def way(x: dict[str, jax.Array]) -> jax.Array:
        scores, value = scored(x)
        where = jnp.broadcast_to(visible(x), scores.shape)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores + bias(x), where=where), value)

    return way


def hidden_again(x: dict[str, jax.Array]) -> jax.Array:
    """What is hidden gets no weight, be there nothing else."""
    (scores, value), seen = scored(x), causal(x) & kept(x)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(seen, scores, -1e9)) * seen, value)


def without_nan(x: dict[str, jax.Array]) -> jax.Array:
    """A softmax of nothing but minus infinity is no number, and put to 0."""
    scores, value = scored(x)
    weights = jax.nn.softmax(jnp.where(kept(x) & causal(x), scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.nan_to_num(weights), value)


def exps_hidden(x: dict[str, jax.Array]) -> jax.Array:
    """A softmax by hand, whose exps are hidden and not its scores."""
    scores, value = scored(x)
    power = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    power = jnp.where(causal(x), power, 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", power / power.sum(-1, keepdims=True), value)


def divided_by_some(x: dict[str, jax.Array]) -> jax.Array:
    """Weights of all keys, by the sum of those that are seen: no softmax."""
    scores, value = scored(x)
    power = jnp.exp(scores)
    total = jnp.where(causal(x), power, 0.0).sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", power / total, value)


def sink_beside_the_sum(
    visible: Callable[[dict[str, jax.Array]], jax.Array] = causal, less: float = 0.0
) -> Way:
    """Return attention by hand whose sum has the exp of a learned score a head, `less` too much taken off."""

    def way(x: dict[str, jax.Array]) -> jax.Array:
        scores, value = scored(x)
        scores, sink = jnp.where(visible(x), scores, -1e30), x["bias"][:, 0, 0][:, None, None]
        most = jnp.maximum(scores.max(-1, keepdims=True), sink)
        power = jnp.exp(scores - most)
        total = power.sum(-1, keepdims=True) + jnp.exp(sink - (most + less if less else most))
        return jnp.einsum("bhqk,bkhd->bqhd", power / total, value)

    return way


def sink_of_plain_exps(x: dict[str, jax.Array]) -> jax.Array:
    """Nothing is taken off before, and the sink comes first."""
    scores, value = scored(x)
    power = jnp.exp(jnp.where(causal(x), scores, -1e30))
    total = jnp.exp(x["bias"][:, :1, :1])[None] + power.sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", power / total, value)


def of_a_cache(x: dict[str, jax.Array]) -> jax.Array:
    """A mask of keys in a cache that was empty, of rows without padding: where each begins is counted."""
    ids = jnp.ones_like(x["segment"])
    start = jnp.sum(jnp.cumsum(ids != 0, axis=-1) == 0, -1)
    start = jnp.where(jnp.full(start.shape, -1) < 0, start, -1)
    place, filled = jnp.arange(ids.shape[1]), jnp.zeros((), jnp.int32)
    queries = filled + place[None] - start[:, None]
    held = (place[None] >= start[:, None]) & (place[None] < filled + ids.shape[1])
    seen = (place[None] - start[:, None])[:, None, :] <= queries[:, :, None]
    return (seen & (held[:, None, :] == ids[:, :, None]))[:, None]


def of_pieces(x: dict[str, jax.Array]) -> jax.Array:
    """Causality made of pieces: turned, joined to a first place that all see, cut out of a larger table."""
    length = x["segment"].shape[1]
    turned = jnp.tril(jnp.ones((length - 1, length - 1), bool))[::-1, ::-1].T
    first = jnp.ones((length - 1, 1), bool)
    whole = jnp.pad(jnp.concatenate([first, turned], axis=1), ((1, 0), (0, 0))) | jnp.eye(length, dtype=bool)
    table = jnp.pad(whole, ((0, 8), (0, 8)))
    return jax.lax.dynamic_slice(table, (0, jnp.zeros((), int)), (length, length))


# What becomes a call of attention.
WAYS: dict[str, Way] = {
    "softmax(where=)": hidden_from_the_softmax(causal),
    "softmax(where=), causal padding": hidden_from_the_softmax(lambda x: causal(x) & kept(x)),
    "softmax(where=), pairs": hidden_from_the_softmax(lambda x: x["pairs"] & causal(x)),
    "softmax(where=), bias and padding": hidden_from_the_softmax(kept, lambda x: x["bias"]),
    "weights hidden again, padding": hidden_again,
    "weights that are no numbers, padding": without_nan,
    "exps hidden": exps_hidden,
    "a sink beside the sum": sink_beside_the_sum(),
    "a sink beside the sum, padding": sink_beside_the_sum(lambda x: causal(x) & kept(x)),
    "a sink of plain exps": sink_of_plain_exps,
    "places of pieces": masked(lambda s, x: jnp.where(of_pieces(x), s, -1e30)),
    "places of a cache": masked(lambda s, x: jnp.where(of_a_cache(x), s, -1e30)),
    "exp of log_softmax": masked(
        lambda s, x: jax.nn.log_softmax(jnp.where(causal(x), s, -1e30)), weights=jnp.exp
    ),
    "exp less logsumexp": masked(
        lambda s, x: s - jax.nn.logsumexp(s, axis=-1, keepdims=True), weights=jnp.exp
    ),
}

# What is left as it is written, with a note that says what of it is in the way.
LEFT: dict[str, tuple[Way, str]] = {
    "sigmoids": (masked(lambda s, x: jnp.where(causal(x), s, -1e30), jax.nn.sigmoid, projected), "sigmoids"),
    "cut at 0": (masked(lambda s, x: jnp.where(causal(x), s, 0.0), jax.nn.relu, projected), "cut at 0"),
    "cut at 0, squared": (
        masked(lambda s, x: jnp.where(causal(x), s, 0.0), lambda s: jax.nn.relu(s) ** 2, projected),
        "cut at 0",
    ),
    "a sink by another measure": (sink_beside_the_sum(less=0.5), "divided by an array"),
    "divided by some": (divided_by_some, "divided by the sum of some"),
}
