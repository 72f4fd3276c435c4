"""The attention half of a layer: projections in and out, plain or latent, and rotary positions.

What lies between them is `sharding.ops.attention`. Rotary positions turn the pairs (i, i + head_dim / 2), the
order in which Hugging Face stores Llama weights.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..flax_nnx import nnx
from .config import DecoderConfig
from .layers import Norm, added_gain, constant, normal

# Cosine and sine of every position's angles, as `rotation` gives them.
Turn = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Projections to queries, keys and values, and the projection back."""

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
        self.output = _output(config, head_dim, rngs)
        if config.bias == "all":
            self.output_bias = constant(0.0, (embed,), ("embed",), config)
        if config.qk_norm:
            self.query_norm = Norm(config, name="head_dim", size=head_dim, rms=True)
            self.key_norm = Norm(config, name="head_dim", size=head_dim, rms=True)

    def project(self, x: jax.Array, turn: Turn | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return scaled queries ``[batch, sequence, heads, head_dim]``, keys and values of `x`.

        `turn` is None with learned positions.
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
        if self.config.bias == "none":
            return heads
        return heads + getattr(self, f"{name}_bias")[...].astype(x.dtype)


class LatentAttention(nnx.Module):
    """Multi-head latent attention: low-rank projections to queries, keys and values (arXiv:2405.04434, 2.1).

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
        self.output = _output(config, wide, rngs)

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


def _output(config: DecoderConfig, head_dim: int, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
    """Return the projection from heads of `head_dim` back to the stream."""
    return normal(
        rngs.params(),
        (config.heads, head_dim, config.embed),
        ("heads", "head_dim", "embed"),
        config,
        fan_in=config.heads * head_dim,
        gain=added_gain(config),
    )


def inverse_frequencies(config: DecoderConfig, *, local: bool = False) -> np.ndarray:
    """Return radians per position of each pair, float32 ``[head_dim / 2]``; of latent heads' turned part.

    `local` gives those of sliding-window layers, which may have their own theta, then unscaled.
    """
    theta = config.rope_theta
    scaled = True
    if local and config.rope_local_theta is not None:
        theta, scaled = config.rope_local_theta, False
    size = config.rope_head_dim or config.head_dim
    pairs = np.arange(size // 2, dtype=np.float64)
    frequencies = theta ** (-2.0 * pairs / size)
    if scaled and config.rope_scaling == "linear":
        frequencies = frequencies / config.rope_factor
    if scaled and config.rope_scaling == "llama3":
        frequencies = _llama3(frequencies, config)
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Slow down pairs whose wavelength exceeds the original context, keep fast ones, blend between.

    The rule of Llama 3.1 (arXiv:2407.21783, and its published `rope_scaling`).
    """
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    turns = config.rope_original_sequence * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / config.rope_factor)


def rotation(positions: jax.Array, frequencies: np.ndarray) -> Turn:
    """Return cosine and sine of each position's angles, float32 ``[..., sequence, 1, head_dim / 2]``."""
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn pairs of `x` ``[batch, sequence, heads, head_dim]`` by the angles of `rotation`, in float32."""
    half = x.shape[-1] // 2
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)
