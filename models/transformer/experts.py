"""A mixture of experts in place of a block's MLP: each token goes to the few experts that its router names.

Each row of the batch is dispatched by itself, so that a batch in parts is the whole batch, and rows on
different devices do not meet. An expert takes `capacity` tokens of a row; what is too many is carried on by
the residual stream (and the shared experts) alone. The products are plain batched ones over the experts.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from .config import DecoderConfig
from .layers import Mlp, activated, added_gain, normal


def capacity(config: DecoderConfig, sequence: int) -> int:
    """Return how many tokens of a row an expert takes: its even share times `expert_capacity`, or all."""
    if config.expert_capacity is None:
        return sequence
    even = sequence * (config.experts_per_token or 1) / (config.experts or 1)
    return min(sequence, max(1, math.ceil(even * config.expert_capacity)))


def dispatch(chosen: jax.Array, experts: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """Give each choice a slot of its expert, the first tokens first.

    Args:
      chosen: int32 ``[sequence, choices]``, the experts of each token.
      experts: how many there are.
      slots: how many tokens each takes.

    Returns:
      The token in each slot, ``[experts * slots]``, `sequence` where there is none; and the slot of each
      choice, ``[sequence, choices]``, ``experts * slots`` where there was none left.
    """
    sequence, choices = chosen.shape
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    by_expert = flat[order]
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1)
    starts = jnp.cumsum(counts) - counts
    rank = jnp.arange(sequence * choices, dtype=jnp.int32) - starts[by_expert]
    slot = jnp.where(rank < slots, by_expert * slots + rank, experts * slots)
    tokens = jnp.full(experts * slots, sequence, jnp.int32).at[slot].set(order // choices, mode="drop")
    places = jnp.zeros(sequence * choices, jnp.int32).at[order].set(slot)
    return tokens, places.reshape(sequence, choices)


class Experts(nnx.Module):
    """Router, experts and, where the config has them, shared experts that every token goes to."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        count, embed, mlp = config.experts, config.embed, config.expert_mlp
        assert count is not None
        assert mlp is not None
        # Every token is scored by all experts where it is: what spreads them does not spread their scores.
        self.router = normal(rngs.params(), (embed, count), ("embed", "scores"), config, fan_in=embed)
        wide, narrow = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        if config.activation != "gelu":
            self.gate = normal(rngs.params(), (count, embed, mlp), wide, config, fan_in=embed)
        self.up = normal(rngs.params(), (count, embed, mlp), wide, config, fan_in=embed)
        gain = added_gain(config)
        self.down = normal(rngs.params(), (count, mlp, embed), narrow, config, fan_in=mlp, gain=gain)
        if config.shared_experts:
            self.shared = Mlp(config, rngs=rngs, hidden=config.shared_experts * mlp)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[batch, sequence, embed]`` to the same."""
        config = self.config
        batch, sequence, embed = x.shape
        count, slots = config.experts or 0, capacity(config, sequence)
        weights, chosen = self.route(x)
        tokens, places = jax.vmap(lambda row: dispatch(row, count, slots))(chosen)
        look_up = jax.vmap(lambda rows, index: rows.at[index].get(mode="fill", fill_value=0))
        taken = look_up(x, tokens).reshape(batch, count, slots, embed)
        given = self._work(taken).reshape(batch, count * slots, embed)
        back = look_up(given, places.reshape(batch, -1)).reshape(batch, sequence, -1, embed)
        out = jnp.einsum("bsk,bske->bse", weights.astype(x.dtype), back)
        return out + self.shared(x) if config.shared_experts else out

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the weights, float32, and indices of each token's experts ``[batch, sequence, choices]``."""
        config = self.config
        wide = x.astype(jnp.float32)
        scores = jnp.einsum("bse,ex->bsx", wide, self.router[...].astype(jnp.float32))
        sigmoid = config.router == "sigmoid"
        scores = jax.nn.sigmoid(scores) if sigmoid else jax.nn.softmax(scores, axis=-1)
        weights, chosen = jax.lax.top_k(scores, config.experts_per_token or 1)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights * config.router_scale, chosen.astype(jnp.int32)

    def _work(self, x: jax.Array) -> jax.Array:
        """Map ``[batch, experts, slots, embed]`` to the same, every expert its own slots."""
        up, gate = jnp.einsum("bxce,xef->bxcf", x, self.up[...].astype(x.dtype)), None
        if self.config.activation != "gelu":
            gate = jnp.einsum("bxce,xef->bxcf", x, self.gate[...].astype(x.dtype))
        hidden = activated(self.config, up, gate)
        return jnp.einsum("bxcf,xfe->bxce", hidden, self.down[...].astype(x.dtype))
