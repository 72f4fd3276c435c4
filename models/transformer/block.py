"""One layer: attention and MLP, each normalised before, optionally after, and added to the stream."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from ...sharding.ops import attention
from ...sharding.ops.plain import View, attend
from .attention import Attention
from .config import DecoderConfig
from .experts import Experts
from .latent import LatentAttention
from .mlp import Mlp
from .norm import Norm

Turn = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """Keys and values of a row so far, ``[batch, length, kv_heads, head_dim]`` (stacked: layers first)."""

    key: jax.Array
    value: jax.Array


class Block(nnx.Module):
    """A decoder layer. `Decoder` holds all of them stacked in one.

    `dense` layers have an MLP where the others have experts.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dense: bool = False):
        self.config = config
        self.attention_norm = Norm(config)
        latent = config.kv_rank is not None
        self.attention = (LatentAttention if latent else Attention)(config, rngs=rngs)
        self.mlp_norm = Norm(config)
        mixture = config.experts is not None and not dense
        self.mlp = (Experts if mixture else Mlp)(config, rngs=rngs)
        if config.post_norms:
            self.attention_post_norm = Norm(config)
            self.mlp_post_norm = Norm(config)

    def __call__(self, x: jax.Array, turn: Turn | None, view: View) -> jax.Array:
        """Map the stream ``[batch, sequence, embed]`` to itself; every row sees what `view` lets it."""
        query, key, value = self.attention.project(self.attention_norm(x), turn)
        out = attention(
            query,
            key,
            value,
            segment_ids=view.query_segments,
            window=view.window,
            cap=self.config.attention_soft_cap,
            scale=1.0,
            chunk=self.config.attention_chunk,
        )
        return self._finish(x, out)

    def step(self, x: jax.Array, turn: Turn | None, view: View, cache: Cache) -> tuple[jax.Array, Cache]:
        """Map one token of each row ``[batch, 1, embed]``, seeing those that the cache holds."""
        query, key, value = self.attention.project(self.attention_norm(x), turn)
        place = (0, view.query_index[0], 0, 0)
        cache = Cache(
            *(
                jax.lax.dynamic_update_slice(old, new, place)
                for old, new in zip(cache, (key, value), strict=True)
            )
        )
        out = attend(query, cache.key, cache.value, view, cap=self.config.attention_soft_cap)
        return self._finish(x, out), cache

    def _finish(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        post = self.config.post_norms
        out = self.attention.merge(heads)
        x = x + (self.attention_post_norm(out) if post else out)
        out = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(out) if post else out)
