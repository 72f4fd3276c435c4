"""Attention in the ways that people write it: functions of arrays, each with what is to become of it.

Arrays: query ``[batch, length, heads, width]``, key and value with fewer heads; `segment` and `keep` (a key
that counts) ``[batch, length]``; `bias` ``[heads, length, length]``; `pairs` ``[batch, 1, length, length]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 16, 4, 2, 8

Way = Callable[[dict[str, jax.Array]], jax.Array]


def arrays(seed: int = 0, length: int = LENGTH) -> dict[str, jax.Array]:
    """Return arrays for every way."""
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    keep = np.ones((BATCH, length), bool)
    keep[1, -5:] = False
    return {
        "query": normal(BATCH, length, HEADS, WIDTH),
        "key": normal(BATCH, length, KV_HEADS, WIDTH),
        "value": normal(BATCH, length, KV_HEADS, WIDTH),
        "segment": jnp.asarray(np.sort(draw.integers(0, 3, (BATCH, length))), jnp.int32),
        "keep": jnp.asarray(keep),
        "bias": normal(HEADS, length, length),
        "pairs": jnp.asarray(draw.random((BATCH, 1, length, length)) < 0.6) | jnp.eye(length, dtype=bool),
    }


def rows(x: dict[str, jax.Array]) -> jax.Array:
    """Return the place of each query, as a column."""
    return jnp.arange(x["query"].shape[1])[:, None]


def columns(x: dict[str, jax.Array]) -> jax.Array:
    """Return the place of each key, as a row."""
    return jnp.arange(x["key"].shape[1])[None, :]


def repeated(x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return queries, and keys and values with as many heads."""
    times = x["query"].shape[2] // x["key"].shape[2]
    return x["query"], jnp.repeat(x["key"], times, 2), jnp.repeat(x["value"], times, 2)


def masked(
    change: Callable[..., jax.Array],
    weights: Callable[[jax.Array], jax.Array] = jax.nn.softmax,
    operands: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] = repeated,
) -> Way:
    """Return attention whose scores ``[batch, heads, rows, columns]`` are changed before the softmax."""

    def way(x: dict[str, jax.Array]) -> jax.Array:
        query, key, value = operands(x)
        scores = change(jnp.einsum("bqhd,bkhd->bhqk", query, key) * WIDTH**-0.5, x)
        return jnp.einsum("bhqk,bkhd->bqhd", weights(scores), value)

    return way


def hiding(visible: Callable[[dict[str, jax.Array]], jax.Array], fill: float = -1e30) -> Way:
    """Return attention to what is `visible`."""
    return masked(lambda scores, x: jnp.where(visible(x), scores, fill))


def adding(bias: Callable[[dict[str, jax.Array]], jax.Array]) -> Way:
    """Return attention with something added to scores."""
    return masked(lambda scores, x: scores + bias(x))


def library(**options: Callable[[dict[str, jax.Array]], Any]) -> Way:
    """Return `jax.nn.dot_product_attention`, with options made of the arrays."""

    def way(x: dict[str, jax.Array]) -> jax.Array:
        given = {name: option(x) for name, option in options.items()}
        return jax.nn.dot_product_attention(x["query"], x["key"], x["value"], **given)

    return way


def causal(x: dict[str, jax.Array]) -> jax.Array:
    return rows(x) >= columns(x)


def documents(x: dict[str, jax.Array]) -> jax.Array:
    return x["segment"][:, None, :, None] == x["segment"][:, None, None, :]


def kept(x: dict[str, jax.Array]) -> jax.Array:
    return x["keep"][:, None, None, :]


def heads_first(x: dict[str, jax.Array]) -> jax.Array:
    """As torch lays it out: heads before the sequence, matrix products by `@`."""
    query, key, value = (array.transpose(0, 2, 1, 3) for array in repeated(x))
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(WIDTH)
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return (jax.nn.softmax(scores, -1) @ value).transpose(0, 2, 1, 3)


def heads_in_the_batch(x: dict[str, jax.Array]) -> jax.Array:
    batch, length = x["query"].shape[:2]
    query, key, value = (a.swapaxes(1, 2).reshape(batch * HEADS, length, WIDTH) for a in repeated(x))
    scores = jnp.einsum("nqd,nkd->nqk", query, key) * WIDTH**-0.5
    out = jax.nn.softmax(jnp.where(causal(x), scores, -1e30)) @ value
    return out.reshape(batch, HEADS, length, WIDTH).swapaxes(1, 2)


def softmax_by_hand(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = repeated(x)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * WIDTH**-0.5, key)
    scores = scores - 1e9 * (rows(x) < columns(x))
    power = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return jnp.einsum("bhqk,bkhd->bqhd", power / power.sum(-1, keepdims=True), value)


def groups_of_heads(x: dict[str, jax.Array]) -> jax.Array:
    batch, length = x["query"].shape[:2]
    query = x["query"].reshape(batch, length, KV_HEADS, HEADS // KV_HEADS, WIDTH)
    scores = jnp.einsum("bqngd,bknd->bngqk", query, x["key"]) * WIDTH**-0.5
    weights = jax.nn.softmax(jnp.where(causal(x), scores, -1e30), -1)
    return jnp.einsum("bngqk,bknd->bqngd", weights, x["value"]).reshape(x["query"].shape)


def one_kv_head(x: dict[str, jax.Array]) -> jax.Array:
    scores = jnp.einsum("bqhd,bkd->bhqk", x["query"], x["key"][:, :, 0]) * WIDTH**-0.5
    weights = jax.nn.softmax(jnp.where(causal(x), scores, -1e30), -1)
    return jnp.einsum("bhqk,bkd->bqhd", weights, x["value"][:, :, 0])


def mapped_over_heads(x: dict[str, jax.Array]) -> jax.Array:
    """One head of one sequence, mapped over heads and over the batch, as Equinox's users do."""

    def head(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        scores = query @ key.T / jnp.sqrt(query.shape[-1])
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape)) == 0, jnp.finfo(scores.dtype).min, scores)
        return jax.nn.softmax(scores, axis=-1) @ value

    return jax.vmap(jax.vmap(head, (1, 1, 1), 1))(*repeated(x))


def half_precision(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = (array.astype(jnp.bfloat16) for array in repeated(x))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32) * WIDTH**-0.5
    weights = jax.nn.softmax(jnp.where(causal(x), scores, -1e30), -1).astype(jnp.bfloat16)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).astype(jnp.float32)


def widened(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = (array.astype(jnp.bfloat16) for array in repeated(x))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query.astype(jnp.float32) * WIDTH**-0.5, key.astype(jnp.float32))
    weights = jax.nn.softmax(jnp.where(causal(x), scores, -1e30), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value.astype(jnp.float32))


def in_a_checkpoint(x: dict[str, jax.Array]) -> jax.Array:
    mask = causal(x) & documents(x)
    inner = masked(lambda scores, x: jnp.where(mask, scores, -1e30))
    return jax.checkpoint(inner)(x)


def in_a_loop(x: dict[str, jax.Array]) -> jax.Array:
    mask = causal(x) & documents(x)
    inner = masked(lambda scores, x: jnp.where(mask, scores, -1e30))

    def turn(query: jax.Array, scale: jax.Array) -> tuple[jax.Array, None]:
        return inner({**x, "query": query * scale}), None

    return jax.lax.scan(turn, x["query"], jnp.arange(1.0, 3.0))[0]


def in_a_checkpointed_loop(x: dict[str, jax.Array]) -> jax.Array:
    def turn(query: jax.Array, _: None) -> tuple[jax.Array, None]:
        return library(mask=documents, is_causal=lambda x: True)({**x, "query": query}), None

    return jax.lax.scan(jax.checkpoint(turn), x["query"], None, length=2)[0]


def under_a_condition(x: dict[str, jax.Array]) -> jax.Array:
    return jax.lax.cond(x["keep"][0, 0], hiding(causal), lambda x: x["query"], x)


def jitted(x: dict[str, jax.Array]) -> jax.Array:
    return jax.jit(jax.jit(hiding(causal)))(x)


def capped(x: dict[str, jax.Array]) -> jax.Array:
    return masked(lambda s, x: jnp.where(causal(x), 20.0 * jnp.tanh(s / 20.0), -1e30))(x)


def linen_mask(x: dict[str, jax.Array]) -> jax.Array:
    from flax import linen as nn

    ids = x["segment"]
    mask = nn.combine_masks(nn.make_causal_mask(ids), nn.make_attention_mask(ids, ids, jnp.equal))
    return nn.dot_product_attention(*repeated(x), mask=mask)


def nnx_padding(x: dict[str, jax.Array]) -> jax.Array:
    from flax import nnx

    mask = nnx.make_attention_mask(x["keep"], x["keep"])
    return nnx.dot_product_attention(*repeated(x), mask=mask)


def nnx_module(x: dict[str, jax.Array]) -> jax.Array:
    from flax import nnx

    features = HEADS * WIDTH
    module = nnx.MultiHeadAttention(HEADS, features, decode=False, rngs=nnx.Rngs(0))
    flat = x["query"].reshape(*x["query"].shape[:2], features)
    return module(flat, mask=nnx.make_causal_mask(x["segment"])).reshape(x["query"].shape)


def linen_module(x: dict[str, jax.Array]) -> jax.Array:
    from flax import linen as nn

    module = nn.MultiHeadDotProductAttention(HEADS)
    flat = x["query"].reshape(*x["query"].shape[:2], HEADS * WIDTH)
    mask = nn.make_causal_mask(x["segment"])
    return module.apply(module.init(jax.random.key(0), flat), flat, mask=mask).reshape(x["query"].shape)


def dropped(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = repeated(x)
    scores = jnp.where(causal(x), jnp.einsum("bqhd,bkhd->bhqk", query, key), -1e30)
    weights = jax.nn.softmax(scores, -1)
    keep = jax.random.bernoulli(jax.random.key(1), 0.9, weights.shape)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(keep, weights / 0.9, 0.0), value)


def nnx_dropped(x: dict[str, jax.Array]) -> jax.Array:
    from flax import nnx

    options = {"dropout_rng": jax.random.key(2), "dropout_rate": 0.2, "broadcast_dropout": False}
    mask = nnx.make_causal_mask(x["segment"])
    return nnx.dot_product_attention(*repeated(x), mask=mask, deterministic=False, **options)


def divided_late(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = repeated(x)
    scores = jnp.where(causal(x), jnp.einsum("bqhd,bkhd->bhqk", query, key) * WIDTH**-0.5, -1e30)
    power = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = power.sum(-1)
    return jnp.einsum("bhqk,bkhd->bqhd", power, value) / total.swapaxes(1, 2)[..., None]


def highest(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = repeated(x)
    asked = {"precision": jax.lax.Precision.HIGHEST}
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, **asked) + x["bias"]
    scores = scores + jnp.where(kept(x), 0.0, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), value, **asked)


def relative_positions(x: dict[str, jax.Array]) -> jax.Array:
    """A number for each distance and head, looked up in a table, as T5 has it."""
    table = x["bias"][:, 0, :9].T
    buckets = jnp.clip(columns(x) - rows(x), -4, 4) + 4
    return table[buckets].transpose(2, 0, 1)[None]


def scaled_after_its_bias(x: dict[str, jax.Array]) -> jax.Array:
    """As Falcon has it: a bias of distances, then the scale, then the mask."""
    query, key, value = repeated(x)
    scores = (jnp.einsum("bqhd,bkhd->bhqk", query, key) + alibi(x)) * WIDTH**-0.5
    weights = jax.nn.softmax(jnp.where(causal(x), scores, -1e30), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def sinks_of_heads(x: dict[str, jax.Array]) -> jax.Array:
    """A learned score a head that takes weight and gives nothing."""
    query, key, value = repeated(x)
    scores = jnp.where(causal(x), jnp.einsum("bqhd,bkhd->bhqk", query, key) * WIDTH**-0.5, -1e30)
    sinks = jnp.broadcast_to(x["bias"][:, 0, :1][None, :, :, None], (*scores.shape[:-1], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sinks], -1), -1)[..., :-1]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def gathered_positions(x: dict[str, jax.Array]) -> jax.Array:
    """A mask of positions that are data, as the JAX models of libraries make it: pairs, then padding."""
    place = jnp.cumsum(x["keep"].astype(jnp.int32), 1)
    return (place[:, None, :, None] >= place[:, None, None, :]) & kept(x)


def of_last_queries(x: dict[str, jax.Array]) -> jax.Array:
    """The last queries against all keys, causal."""
    last = {**x, "query": x["query"][:, -6:]}
    return masked(lambda s, x: jnp.where(jnp.tril(jnp.ones((6, LENGTH)), LENGTH - 6) > 0, s, -1e30))(last)


def two_products(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = repeated(x)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query[..., :4], key[..., :4])
    scores += jnp.einsum("bqhd,bkhd->bhqk", query[..., 4:], key[..., 4:])
    weights = jax.nn.softmax(jnp.where(causal(x), scores, -1e30), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def rotary_beside(x: dict[str, jax.Array]) -> jax.Array:
    """As DeepSeek's latent attention has it: each head's product, and one with rotary keys of all heads."""
    query, key, value = repeated(x)
    own, shared = query[..., :5], key[:, :, 0, 5:]
    scores = jnp.einsum("bqhd,bkhd->bhqk", own, key[..., :5])
    scores = (scores + jnp.einsum("bqhr,bkr->bhqk", query[..., 5:], shared)) * WIDTH**-0.5
    weights = jax.nn.softmax(jnp.where(causal(x) & kept(x), scores, -1e30), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def absorbed(x: dict[str, jax.Array]) -> jax.Array:
    """Latent attention whose keys are values too, one head of them; each product scaled by itself."""
    latent, rotary = x["value"][:, :, 0], x["key"][:, :, 0, :3]
    one = jnp.einsum("bqhr,bkr->bqhk", x["query"][..., :3], rotary) * 0.5
    other = jnp.einsum("bqhc,bkc->bqhk", x["query"], latent) / 4
    scores = jnp.swapaxes(one - other, 1, 2)
    return jnp.einsum("bhqk,bkc->bqhc", jax.nn.softmax(jnp.where(causal(x), scores, -1e9), -1), latent)


def two_products_of_groups(x: dict[str, jax.Array]) -> jax.Array:
    """Groups of heads that read the same keys, in half precision, widened before the products."""
    half = {name: x[name].astype(jnp.bfloat16).astype(jnp.float32) for name in ("query", "key", "value")}
    query = half["query"].reshape(BATCH, -1, KV_HEADS, HEADS // KV_HEADS, WIDTH)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", query[..., :4] * 0.3, half["key"][..., :4])
    scores += jnp.einsum("bqkgd,bskd->bkgqs", query[..., 4:], half["key"][..., 4:]) * 0.2
    out = jnp.einsum(
        "bkgqs,bskd->bqkgd", jax.nn.softmax(jnp.where(causal(x), scores, -1e30), -1), half["value"]
    )
    return out.reshape(x["query"].shape)


def by_a_learned_number(x: dict[str, jax.Array]) -> jax.Array:
    """Cosines of queries and keys, by a number of each head, and by another of each query."""
    query, key, value = (one / (1 + jnp.linalg.norm(one, axis=-1, keepdims=True)) for one in repeated(x))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * jnp.exp(x["bias"][:, 0, 0])[:, None, None]
    scores = scores / jnp.log(rows(x) + 2.0) * x["keep"].astype(jnp.float32).sum(1).reshape(-1, 1, 1, 1)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(causal(x), scores, -1e30), -1), value)


def batch_and_heads_taken_apart(x: dict[str, jax.Array]) -> jax.Array:
    """One batch of all heads, taken apart for the mask alone, as models moved from PyTorch have it."""
    query, key, value = (jnp.swapaxes(one, 1, 2).reshape(-1, LENGTH, WIDTH) for one in repeated(x))
    scores = (query @ jnp.swapaxes(key, 1, 2) / np.sqrt(WIDTH)).reshape(BATCH, HEADS, LENGTH, LENGTH)
    scores = (scores + x["bias"] + jnp.where(kept(x), 0.0, -1e9)).reshape(-1, LENGTH, LENGTH)
    return jnp.swapaxes((jax.nn.softmax(scores, -1) @ value).reshape(BATCH, HEADS, LENGTH, WIDTH), 1, 2)


def windows_of_images(x: dict[str, jax.Array]) -> jax.Array:
    """Windows in the batch, and a mask of some windows, as Swin has it; a bias by a product with one-hots."""
    query, key, value = (one.reshape(BATCH * 4, 4, HEADS, WIDTH) for one in repeated(x))
    distance = jax.nn.one_hot(jnp.arange(4)[:, None] - jnp.arange(4) + 3, 7)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * 0.3, key)
    scores += jnp.einsum("hn,qkn->hqk", x["bias"][:, 0, :7], distance)
    shifted = jnp.where(jnp.arange(4)[:, None, None] % 2 < np.tri(4), 0.0, -100.0)
    scores = (scores.reshape(BATCH, 4, HEADS, 4, 4) + shifted[:, None]).reshape(scores.shape)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), value).reshape(x["query"].shape)


def with_a_sink(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = repeated(x)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    weights = jax.nn.softmax(jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, 1))), -1)[..., :-1]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def difference(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = repeated(x)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    weights = jax.nn.softmax(scores, -1) - 0.3 * jax.nn.softmax(2 * scores, -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def weights_returned(x: dict[str, jax.Array]) -> jax.Array:
    query, key, value = repeated(x)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value) * (1 + jnp.mean(weights**2))


def alibi(x: dict[str, jax.Array]) -> jax.Array:
    slopes = 2.0 ** -jnp.arange(1.0, HEADS + 1)
    return -slopes[:, None, None] * jnp.abs(rows(x) - columns(x))


# What becomes a call of attention.
WAYS: dict[str, Way] = {
    "no mask": masked(lambda scores, x: scores),
    "tril of ones": hiding(lambda x: jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), -jnp.inf),
    "tril of floats": masked(lambda s, x: jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH))) > 0.5, s, -1e10)),
    "places compared": hiding(causal, float(jnp.finfo(jnp.float32).min)),
    "not the future": masked(lambda s, x: jnp.where(columns(x) > rows(x), -1e9, s)),
    "triu of -inf added": adding(lambda x: jnp.triu(jnp.full((LENGTH, LENGTH), -jnp.inf), 1)),
    "(1 - mask) * -1e9 added": adding(lambda x: (1.0 - causal(x).astype(jnp.float32)) * -1e9),
    "where of 0 and -1e9 added": adding(lambda x: jnp.where(causal(x), 0.0, -1e9)),
    "mask from numpy": hiding(lambda x: np.tri(LENGTH, dtype=bool)),
    "window": hiding(lambda x: causal(x) & (rows(x) - columns(x) < 5)),
    "window by two triangles": hiding(
        lambda x: jnp.tril(jnp.ones((LENGTH, LENGTH), bool)) & jnp.triu(jnp.ones((LENGTH, LENGTH), bool), -4)
    ),
    "window of distances": hiding(lambda x: (rows(x) - columns(x) >= 0) & ~(rows(x) - columns(x) > 4)),
    "blocks": hiding(lambda x: rows(x) // 4 == columns(x) // 4),
    "causal blocks": hiding(lambda x: causal(x) & (rows(x) // 8 == columns(x) // 8)),
    "first keys only": hiding(lambda x: columns(x) < 11),
    "padding": hiding(kept),
    "padding, added": adding(lambda x: (1.0 - kept(x)) * -1e9),
    "causal padding": hiding(lambda x: causal(x) & kept(x)),
    "neither future nor padding": masked(lambda s, x: jnp.where(~kept(x) | (columns(x) > rows(x)), -1e9, s)),
    "padding of both": hiding(lambda x: kept(x) & x["keep"][:, None, :, None]),
    "heads first": heads_first,
    "heads in the batch": heads_in_the_batch,
    "softmax by hand": softmax_by_hand,
    "groups of heads": groups_of_heads,
    "one head of keys": one_kv_head,
    "mapped over heads": mapped_over_heads,
    "half precision": half_precision,
    "widened to float32": widened,
    "in a checkpoint": in_a_checkpoint,
    "in a loop": in_a_loop,
    "in a checkpointed loop": in_a_checkpointed_loop,
    "under a condition": under_a_condition,
    "jitted twice": jitted,
    "capped": capped,
    "jax.nn": library(),
    "jax.nn, causal": library(is_causal=lambda x: True, implementation=lambda x: "xla"),
    "jax.nn, window": library(is_causal=lambda x: True, local_window_size=lambda x: 3),
    "jax.nn, mask": library(mask=lambda x: causal(x)[None, None] & documents(x)),
    "jax.nn, lengths": library(key_value_seq_lengths=lambda x: jnp.sum(x["keep"], 1, dtype=jnp.int32)),
    "jax.nn, scale": library(scale=lambda x: 0.3, is_causal=lambda x: True),
    "jax.nn, mapped": lambda x: jax.vmap(lambda q, k, v: jax.nn.dot_product_attention(q, k, v))(
        x["query"], x["key"], x["value"]
    ),
    "Linen's function": linen_mask,
    "Linen's module": linen_module,
    "NNX's function, padded": nnx_padding,
    "NNX's module": nnx_module,
    "prefix": hiding(lambda x: causal(x) | (columns(x) < 5)),
    "window of both sides": hiding(lambda x: jnp.abs(rows(x) - columns(x)) < 3),
    "two steps ahead": hiding(lambda x: columns(x) < rows(x) + 3),
    "causal among the first keys": hiding(lambda x: causal(x) & (columns(x) < 11)),
    "last queries": of_last_queries,
    "every other key": hiding(lambda x: (rows(x) - columns(x)) % 2 == 0),
    "any pairs": hiding(lambda x: x["pairs"]),
    "pairs and padding": hiding(lambda x: x["pairs"] & causal(x) & kept(x), -1e9),
    "pairs of positions": hiding(gathered_positions, float(jnp.finfo(jnp.float32).min)),
    "pairs, added": adding(lambda x: jnp.where(x["pairs"], 0.0, -1e9)),
    "padding and blocks": hiding(lambda x: kept(x) & (rows(x) // 4 == columns(x) // 4), -1e9),
    "bias of heads": adding(lambda x: x["bias"]),
    "bias of distances": adding(alibi),
    "bias, then causal": masked(lambda s, x: jnp.where(causal(x), s + alibi(x), -1e30)),
    "bias of relative positions": adding(relative_positions),
    "scaled after its bias": scaled_after_its_bias,
    "two masks, added": adding(lambda x: jnp.where(kept(x), 0.0, -1e9) + jnp.where(causal(x), 0.0, -1e9)),
    "capped, then padding added": masked(lambda s, x: 20 * jnp.tanh(s / 20) + jnp.where(kept(x), 0.0, -1e9)),
    "jax.nn, bias": library(bias=lambda x: x["bias"][None]),
    "jax.nn, both sides": library(local_window_size=lambda x: (2, 3)),
    "dropout": dropped,
    "NNX's dropout": nnx_dropped,
    "divided late": divided_late,
    "highest precision": highest,
    "a sink": with_a_sink,
    "sinks of heads": sinks_of_heads,
    "by a learned number": by_a_learned_number,
    "batch and heads taken apart": batch_and_heads_taken_apart,
    "windows of images": windows_of_images,
    "two products": two_products,
    "rotary keys of all heads": rotary_beside,
    "absorbed latents": absorbed,
    "two products of groups": two_products_of_groups,
}

# What is left as it is written, with a note that says what of it is in the way.
LEFT: dict[str, tuple[Way, str]] = {
    "weights returned": (weights_returned, "read by more than"),
}

# What is no attention.
OTHER: dict[str, Way] = {"a difference of softmaxes": difference}
