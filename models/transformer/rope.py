"""Rotary position embedding: angles from positions, and the turn they give to queries and keys.

Pairs are (i, i + head_dim / 2), the order in which Hugging Face stores Llama weights.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from .config import DecoderConfig


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


def rotation(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
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
