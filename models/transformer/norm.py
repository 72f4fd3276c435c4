"""Normalisation over the last dimension, in float32 whatever the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from .config import DecoderConfig
from .param import constant


def rms_norm(x: jax.Array, scale: jax.Array, *, epsilon: float) -> jax.Array:
    """Divide `x` ``[..., features]`` by its root mean square and multiply by `scale` ``[features]``."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float) -> jax.Array:
    """Bring `x` ``[..., features]`` to mean 0 and variance 1, then scale and shift by feature."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return (centred * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class Norm(nnx.Module):
    """The norm that the config asks for, over a dimension called `name`."""

    def __init__(
        self, config: DecoderConfig, *, name: str = "embed", size: int | None = None, rms: bool = False
    ):
        self.epsilon = config.norm_epsilon
        self.offset = config.norm_offset
        self.layer = config.norm == "layer" and not rms
        shape = (size or config.embed,)
        self.scale = constant(0.0 if self.offset else 1.0, shape, (name,), config)
        if self.layer:
            self.bias = constant(0.0, shape, (name,), config)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``[..., features]``."""
        scale = self.scale[...]
        if self.layer:
            return layer_norm(x, scale, self.bias[...], epsilon=self.epsilon)
        # The offset is added in float32: 1 + a small bfloat16 scale would lose it.
        return rms_norm(x, scale.astype(jnp.float32) + 1.0 if self.offset else scale, epsilon=self.epsilon)
