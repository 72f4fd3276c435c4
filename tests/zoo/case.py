"""What a model of the zoo consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import draws
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A loss ``loss(params, batch) -> scalar`` with its parameters and data made from keys.

    `mixes` says that examples depend on each other, so that the loss of a batch is not the mean of the
    losses of its parts.
    """

    loss: Callable[[Any, Any], jax.Array]
    init: Callable[[jax.Array], Any]
    data: Callable[[jax.Array], Any]
    mixes: bool = False

    def arrays(self, seed: int = 0) -> tuple[Any, Any]:
        """Return concrete (params, batch)."""
        key_params, key_data = jax.random.split(jax.random.key(seed))
        return self.init(key_params), self.data(key_data)

    def shapes(self) -> tuple[Any, Any]:
        """Return abstract (params, batch)."""
        return jax.eval_shape(self.arrays)


class Keys:
    """Hands out parameters, each with a key of its own."""

    def __init__(self, key: jax.Array) -> None:
        self._key = key

    def normal(self, *shape: int, fan_in: int | None = None) -> jax.Array:
        """Return a weight of variance 1 / fan_in (by default, all dimensions but the last)."""
        self._key, key = jax.random.split(self._key)
        if fan_in is None:
            fan_in = 1
            for size in shape[:-1]:
                fan_in *= size
        return draws.normal(key, shape) / jnp.sqrt(fan_in)


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Normalise the last dimension by its root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -log p(target), shaped as targets; logits are [..., classes]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
