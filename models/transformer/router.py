"""Which experts a token goes to: scores, groups of experts, a bias that evens loads, what losses ask of them.

    scores ─► + bias ─► best groups ─► best experts ─► weights of their scores, without the bias

All that is counted is counted by row, so that it adds up over whatever parts a batch is worked through in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .config import DecoderConfig

# Experts whose scores, added up, are a group's (DeepSeek-V3, arXiv:2412.19437).
_JUDGED = 2


class Routing(NamedTuple):
    """What a layer's router did with each row of the batch, float32; of all layers one dimension more.

    load: ``[batch, experts]``, choices of counted tokens.
    balance: ``[batch]``, the row's balance loss: 1 where all experts are chosen alike.
    dropped: ``[batch]``, the share of choices that found no place, where experts have a capacity.
    """

    load: jax.Array
    balance: jax.Array
    dropped: jax.Array


def scores_of(config: DecoderConfig, x: jax.Array, router: jax.Array) -> jax.Array:
    """Return how well each expert suits each token, float32 ``[batch, sequence, experts]``."""
    logits = jnp.einsum("bse,ex->bsx", x.astype(jnp.float32), router.astype(jnp.float32))
    return jax.nn.sigmoid(logits) if config.router == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def choose(config: DecoderConfig, scores: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the weights, float32, and int32 experts of each token's choices ``[batch, sequence, choices]``.

    `bias` ``[experts]`` decides with the scores who is chosen, never with what weight.
    """
    choices = config.experts_per_token or 1
    if bias is None and config.router_groups is None:
        weights, chosen = jax.lax.top_k(scores, choices)
    else:
        ranked = jax.lax.stop_gradient(scores)
        ranked = ranked if bias is None else ranked + bias
        if config.router_groups is not None:
            ranked = _of_best_groups(config, ranked)
        chosen = jax.lax.top_k(ranked, choices)[1]
        weights = jnp.sum(jnp.where(_hits(scores, chosen), scores[:, :, None], 0.0), axis=-1)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights * config.router_scale, chosen.astype(jnp.int32)


def _of_best_groups(config: DecoderConfig, ranked: jax.Array) -> jax.Array:
    """Return `ranked` with experts of all but each token's best groups where none is chosen."""
    groups, taken = config.router_groups or 1, config.router_groups_per_token or 1
    each = ranked.reshape(*ranked.shape[:2], groups, -1)
    judged = min(_JUDGED, each.shape[-1])
    best = jax.lax.top_k(jnp.sum(jax.lax.top_k(each, judged)[0], axis=-1), taken)[1]
    among = jnp.any(best[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(among[..., None], each, -jnp.inf).reshape(ranked.shape)


def is_watched(config: DecoderConfig) -> bool:
    """Whether layers say how they routed tokens: for a bias, a loss, or the share that was dropped."""
    asking = config.router_bias_rate, config.balance_loss, config.expert_capacity
    return any(one is not None for one in asking)


def routing(
    scores: jax.Array, chosen: jax.Array, counted: jax.Array | None, dropped: jax.Array | None
) -> Routing:
    """Return what is known of each row's routing.

    A row's balance loss is the sum over experts of (share of choices · mean share of scores), times how many
    experts there are (arXiv:2412.19437, equations 17 to 20).

    Args:
        scores: ``[batch, sequence, experts]``.
        chosen: ``[batch, sequence, choices]``.
        counted: bool ``[batch, sequence]``, which tokens are any; all of them if None.
        dropped: bool ``[batch, sequence, choices]``, which choices found no place; none if None.
    """
    hits = jnp.any(_hits(scores, chosen), axis=2).astype(jnp.float32)
    shares = scores / jnp.sum(scores, axis=-1, keepdims=True)
    tokens: Any = float(scores.shape[1])
    lost = jnp.zeros(chosen.shape[:2]) if dropped is None else jnp.mean(dropped.astype(jnp.float32), axis=-1)
    if counted is not None:
        weight = counted.astype(jnp.float32)
        hits, shares, lost = hits * weight[..., None], shares * weight[..., None], lost * weight
        tokens = jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0)
    load = jax.lax.stop_gradient(jnp.sum(hits, axis=1))
    each = load / (tokens * chosen.shape[2]) * (jnp.sum(shares, axis=1) / tokens)
    return Routing(
        load=load,
        balance=scores.shape[2] * jnp.sum(each, axis=-1),
        dropped=jnp.sum(lost / tokens, axis=1),
    )


def _hits(scores: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return which expert each choice is, bool ``[batch, sequence, choices, experts]``."""
    # A comparison instead of a gather of floats, which sharded experts would have to be collected for.
    return chosen[..., None] == jnp.arange(scores.shape[2], dtype=chosen.dtype)


def renewed(config: DecoderConfig, bias: jax.Array, load: jax.Array) -> jax.Array:
    """Return the bias ``[layers, experts]`` of the next step, from the batch's `load` of the same shape.

    Experts with more than the mean are moved down by `router_bias_rate`, those with fewer up.
    """
    mean = jnp.mean(load, axis=-1, keepdims=True)
    return bias + (config.router_bias_rate or 0.0) * jnp.sign(mean - load)


def told(config: DecoderConfig, found: Routing) -> dict[str, jax.Array]:
    """Return metrics of all layers' routing: the fullest expert over the mean, the share that was dropped."""
    load = jnp.sum(found.load, axis=1)
    fullest = jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1.0)
    metrics = {"expert_load": jnp.mean(fullest)}
    if config.expert_capacity is not None:
        metrics["dropped"] = jnp.mean(found.dropped)
    return metrics
