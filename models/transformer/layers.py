"""Parts of a layer: parameters that know the names of their dimensions, norms, and the MLP."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..flax_nnx import nnx
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
    """Return a parameter of standard deviation gain / sqrt(fan_in), its dimensions labelled `names`.

    Drawn as a matrix, head_dim merged into the heads before it, which stay free to be sharded: the CPU
    compiler takes 3 s over random bits of three dimensions and 0.3 s over those of two.
    """
    matrix = shape
    if names[0] == "experts":
        matrix = (shape[0] * shape[1], *shape[2:])
    elif "head_dim" in names[1:] and len(shape) > 2:
        at = names.index("head_dim")
        matrix = (*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])
    value = jax.random.normal(key, matrix, jnp.float32).reshape(shape) * (gain * fan_in**-0.5)
    return nnx.Param(value.astype(config.param_dtype), dims=names)


def constant(
    value: float, shape: tuple[int, ...], names: Names, config: DecoderConfig
) -> nnx.Param[jax.Array]:
    """Return a parameter that starts as `value` everywhere, its dimensions labelled `names`."""
    return nnx.Param(jnp.full(shape, value, config.param_dtype), dims=names)


def added_gain(config: DecoderConfig) -> float:
    """Return the gain of matrices whose results are added to the stream, two a layer.

    The sum of all of them then varies as one does, whatever the depth (GPT-2's scaled initialisation).
    """
    return (2 * config.layers) ** -0.5


def rms_norm(x: jax.Array, scale: jax.Array, *, epsilon: float) -> jax.Array:
    """Divide `x` ``[..., features]`` by its root mean square and multiply by `scale` ``[features]``.

    In float32 whatever the type of `x`, which the result has again.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float) -> jax.Array:
    """Bring `x` ``[..., features]`` to mean 0 and variance 1, then scale and shift by feature; in float32."""
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


def silu(x: jax.Array) -> jax.Array:
    """Return x · sigmoid(x)."""
    return x * jax.lax.logistic(x)


def gelu(x: jax.Array) -> jax.Array:
    """Return the tanh approximation of GELU (Hendrycks & Gimpel, arXiv:1606.08415)."""
    return 0.5 * x * (1.0 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


def activated(config: DecoderConfig, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Return act(gate) · up, or act(up) for an activation that has no gate."""
    if gate is None:
        return gelu(up)
    return (silu if config.activation == "swiglu" else gelu)(gate) * up


class Mlp(nnx.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, hidden: int | None = None):
        self.config = config
        mlp = config.mlp if hidden is None else hidden
        self.gated = config.activation != "gelu"
        self.biased = config.bias == "all"
        wide, narrow = (config.embed, mlp), (mlp, config.embed)
        if self.gated:
            self.gate = normal(rngs.params(), wide, ("embed", "mlp"), config, fan_in=config.embed)
        self.up = normal(rngs.params(), wide, ("embed", "mlp"), config, fan_in=config.embed)
        gain = added_gain(config)
        self.down = normal(rngs.params(), narrow, ("mlp", "embed"), config, fan_in=mlp, gain=gain)
        if self.biased:
            if self.gated:
                self.gate_bias = constant(0.0, (mlp,), ("mlp",), config)
            self.up_bias = constant(0.0, (mlp,), ("mlp",), config)
            self.down_bias = constant(0.0, (config.embed,), ("embed",), config)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``[batch, sequence, embed]`` to the same."""
        up = self._project(x, "up")
        gate = self._project(x, "gate") if self.gated else None
        return self._project(activated(self.config, up, gate), "down")

    def _project(self, x: jax.Array, name: str) -> jax.Array:
        out = jnp.einsum("bsi,io->bso", x, getattr(self, name)[...].astype(x.dtype))
        return out + getattr(self, f"{name}_bias")[...].astype(x.dtype) if self.biased else out
