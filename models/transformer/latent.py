"""Multi-head latent attention: queries, keys and values from low-rank projections (arXiv:2405.04434, 2.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from .config import DecoderConfig
from .norm import Norm
from .param import normal
from .rope import rotate

Turn = tuple[jax.Array, jax.Array]


class LatentAttention(nnx.Module):
    """The projections of latent attention, around `sharding.ops.attention`.

    A head's query and key are a part of `head_dim` without positions and a part of `rope_head_dim` that is
    turned; that part of the key is one for all heads.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed, heads, rank = config.embed, config.heads, config.kv_rank
        turned, wide = config.rope_head_dim, config.value_head_dim
        assert rank is not None
        assert turned is not None
        assert wide is not None
        whole = config.head_dim + turned
        if config.query_rank is not None:
            low = config.query_rank
            self.query_down = normal(
                rngs.params(), (embed, low), ("embed", "query_rank"), config, fan_in=embed
            )
            self.query_norm = Norm(config, name="query_rank", size=low)
        width, label = (embed, "embed") if config.query_rank is None else (config.query_rank, "query_rank")
        dims = (label, "heads", "head_dim")
        self.query = normal(rngs.params(), (width, heads, whole), dims, config, fan_in=width)
        self.kv_down = normal(rngs.params(), (embed, rank), ("embed", "kv_rank"), config, fan_in=embed)
        self.key_turned = normal(rngs.params(), (embed, turned), ("embed", "head_dim"), config, fan_in=embed)
        self.kv_norm = Norm(config, name="kv_rank", size=rank)
        dims = ("kv_rank", "heads", "head_dim")
        self.key = normal(rngs.params(), (rank, heads, config.head_dim), dims, config, fan_in=rank)
        self.value = normal(rngs.params(), (rank, heads, wide), dims, config, fan_in=rank)
        self.output = normal(
            rngs.params(),
            (heads, wide, embed),
            ("heads", "head_dim", "embed"),
            config,
            fan_in=heads * wide,
            gain=(2 * config.layers) ** -0.5,
        )

    def project(self, x: jax.Array, turn: Turn | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return scaled queries, keys ``[batch, sequence, heads, head_dim + rope_head_dim]``, and values."""
        config = self.config
        assert turn is not None
        assert config.rope_head_dim is not None
        cos, sin = turn
        low = x
        if config.query_rank is not None:
            low = self.query_norm(jnp.einsum("bse,er->bsr", x, self.query_down[...].astype(x.dtype)))
        query = jnp.einsum("bsr,rhd->bshd", low, self.query[...].astype(x.dtype))
        latent = self.kv_norm(jnp.einsum("bse,er->bsr", x, self.kv_down[...].astype(x.dtype)))
        shared = jnp.einsum("bse,ed->bsd", x, self.key_turned[...].astype(x.dtype))[:, :, None]
        key = jnp.einsum("bsr,rhd->bshd", latent, self.key[...].astype(x.dtype))
        value = jnp.einsum("bsr,rhd->bshd", latent, self.value[...].astype(x.dtype))
        scale = (config.head_dim + config.rope_head_dim) ** -0.5
        scale = scale if config.query_scale is None else config.query_scale
        plain = (query[..., : config.head_dim].astype(jnp.float32) * scale).astype(query.dtype)
        query = jnp.concatenate(
            (plain, rotate(query[..., config.head_dim :], cos * scale, sin * scale)), axis=-1
        )
        turned = jnp.broadcast_to(rotate(shared, cos, sin), (*key.shape[:3], config.rope_head_dim))
        return query, jnp.concatenate((key, turned), axis=-1), value

    def merge(self, out: jax.Array) -> jax.Array:
        """Map heads ``[batch, sequence, heads, value_head_dim]`` back to ``[batch, sequence, embed]``."""
        return jnp.einsum("bshd,hde->bse", out, self.output[...].astype(out.dtype))
