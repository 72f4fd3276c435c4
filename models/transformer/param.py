"""Parameters that know the names of their dimensions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from .config import DecoderConfig

Names = tuple[str, ...]


def normal(
    key: jax.Array,
    shape: tuple[int, ...],
    names: Names,
    config: DecoderConfig,
    *,
    fan_in: int,
    gain: float = 1.0,
) -> nnx.Param[jax.Array]:
    """Return a parameter of standard deviation gain / sqrt(fan_in), its dimensions labelled `names`."""
    value = jax.random.normal(key, shape, jnp.float32) * (gain * fan_in**-0.5)
    return nnx.Param(value.astype(config.param_dtype), dims=names)


def constant(
    value: float, shape: tuple[int, ...], names: Names, config: DecoderConfig
) -> nnx.Param[jax.Array]:
    """Return a parameter that starts as `value` everywhere, its dimensions labelled `names`."""
    return nnx.Param(jnp.full(shape, value, config.param_dtype), dims=names)
