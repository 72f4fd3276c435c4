"""The attention half of a block: projections in and out, around `sharding.ops.attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from .config import DecoderConfig
from .norm import Norm
from .param import constant, normal
from .rope import rotate


class Attention(nnx.Module):
    """Projections to queries, keys and values, attention, and the projection back."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, head_dim = config.embed, config.head_dim
        for name, heads, label in (
            ("query", config.heads, "heads"),
            ("key", config.kv_heads, "kv_heads"),
            ("value", config.kv_heads, "kv_heads"),
        ):
            names = ("embed", label, "head_dim")
            setattr(self, name, normal(rngs.params(), (embed, heads, head_dim), names, config, fan_in=embed))
            if config.bias != "none":
                setattr(self, f"{name}_bias", constant(0.0, (heads, head_dim), names[1:], config))
        self.output = normal(
            rngs.params(),
            (config.heads, head_dim, embed),
            ("heads", "head_dim", "embed"),
            config,
            fan_in=config.heads * head_dim,
            gain=(2 * config.layers) ** -0.5,
        )
        if config.bias == "all":
            self.output_bias = constant(0.0, (embed,), ("embed",), config)
        if config.qk_norm:
            self.query_norm = Norm(config, name="head_dim", size=head_dim, rms=True)
            self.key_norm = Norm(config, name="head_dim", size=head_dim, rms=True)

    def project(
        self, x: jax.Array, turn: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return scaled queries ``[batch, sequence, heads, head_dim]``, keys and values of `x`.

        `turn` holds the cosines and sines of `rope.rotation`, or is None with learned positions.
        """
        config = self.config
        query, key, value = (self._heads(x, name) for name in ("query", "key", "value"))
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        if turn is None:
            return query * scale, key, value
        # Scaling inside the turn happens in float32; a bfloat16 scale would be off by up to 0.4 %.
        cos, sin = turn
        return rotate(query, cos * scale, sin * scale), rotate(key, cos, sin), value

    def merge(self, out: jax.Array) -> jax.Array:
        """Map heads ``[batch, sequence, heads, head_dim]`` back to ``[batch, sequence, embed]``."""
        merged = jnp.einsum("bshd,hde->bse", out, self.output[...].astype(out.dtype))
        return merged + self.output_bias[...].astype(out.dtype) if self.config.bias == "all" else merged

    def _heads(self, x: jax.Array, name: str) -> jax.Array:
        heads = jnp.einsum("bse,ehd->bshd", x, getattr(self, name)[...].astype(x.dtype))
        return (
            heads
            if self.config.bias == "none"
            else heads + getattr(self, f"{name}_bias")[...].astype(x.dtype)
        )
