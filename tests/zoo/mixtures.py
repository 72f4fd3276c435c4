"""A mixture of experts by einsum: dense dispatch, no capacity limit, so that tokens do not compete."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zoo.case import Case, Keys, cross_entropy, rms_norm


def mixture_of_experts(scale: int = 1) -> Case:
    """Top-2 of 8 experts, combined by one-hot weights."""
    vocab, embed, mlp, experts, batch, sequence = 64, 32 * scale, 64 * scale, 8, 8, 16

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "embedding": k.normal(vocab, embed, fan_in=1),
            "router": k.normal(embed, experts),
            "norm": jnp.ones(embed),
            "up": k.normal(experts, embed, mlp, fan_in=embed),
            "down": k.normal(experts, mlp, embed, fan_in=mlp),
            "head": k.normal(embed, vocab),
        }

    def data(key: jax.Array) -> dict:
        return {"tokens": jax.random.randint(key, (batch, sequence + 1), 0, vocab)}

    def loss(params: dict, data: dict) -> jax.Array:
        x = params["embedding"][data["tokens"][:, :-1]]
        h = rms_norm(x, params["norm"])
        probabilities = jax.nn.softmax(h @ params["router"])
        weights, chosen = jax.lax.top_k(probabilities, 2)
        weights = weights / jnp.sum(weights, -1, keepdims=True)
        combine = jnp.einsum("bsk,bskx->bsx", weights, jax.nn.one_hot(chosen, experts))
        hidden = jax.nn.silu(jnp.einsum("bse,xef->bsxf", h, params["up"]))
        x = x + jnp.einsum("bsxf,xfe,bsx->bse", hidden, params["down"], combine)
        return jnp.mean(cross_entropy(x @ params["head"], data["tokens"][:, 1:]))

    return Case(loss=loss, init=init, data=data)
