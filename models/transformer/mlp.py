"""The feed-forward half of a block, gated or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from .config import DecoderConfig
from .param import constant, normal


def silu(x: jax.Array) -> jax.Array:
    """Return x · sigmoid(x)."""
    return x * jax.lax.logistic(x)


def gelu(x: jax.Array) -> jax.Array:
    """Return the tanh approximation of GELU (Hendrycks & Gimpel, arXiv:1606.08415)."""
    return 0.5 * x * (1.0 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


class Mlp(nnx.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, hidden: int | None = None):
        mlp = config.mlp if hidden is None else hidden
        self.gated = config.activation != "gelu"
        self.activation = silu if config.activation == "swiglu" else gelu
        self.biased = config.bias == "all"
        wide, narrow = (config.embed, mlp), (mlp, config.embed)
        gain = (2 * config.layers) ** -0.5
        if self.gated:
            self.gate = normal(rngs.params(), wide, ("embed", "mlp"), config, fan_in=config.embed)
        self.up = normal(rngs.params(), wide, ("embed", "mlp"), config, fan_in=config.embed)
        self.down = normal(rngs.params(), narrow, ("mlp", "embed"), config, fan_in=mlp, gain=gain)
        if self.biased:
            if self.gated:
                self.gate_bias = constant(0.0, (mlp,), ("mlp",), config)
            self.up_bias = constant(0.0, (mlp,), ("mlp",), config)
            self.down_bias = constant(0.0, (config.embed,), ("embed",), config)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[batch, sequence, embed]`` to the same."""
        hidden = self._project(x, "up")
        hidden = self.activation(self._project(x, "gate")) * hidden if self.gated else self.activation(hidden)
        return self._project(hidden, "down")

    def _project(self, x: jax.Array, name: str) -> jax.Array:
        out = jnp.einsum("bsi,io->bso", x, getattr(self, name)[...].astype(x.dtype))
        return out + getattr(self, f"{name}_bias")[...].astype(x.dtype) if self.biased else out
