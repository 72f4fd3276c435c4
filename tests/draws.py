"""Random arrays of tests: what `jax.random` gives, without a program compiled for each shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Elements of the shortest row that is drawn; longer ones have eight times as many, and so on.
_SHORTEST = 4096


def normal(key: Any, shape: Sequence[int] = (), dtype: Any = None) -> Any:
    """Return what `jax.random.normal` does, bit for bit.

    JAX draws each element of its own number in the array, so that a row has what a shorter one of one key
    has. Within a function that is being traced it is `jax.random.normal` itself.
    """
    plain = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == () and dtype is None
    if isinstance(key, jax.core.Tracer) or not plain:
        return jax.random.normal(key, shape) if dtype is None else jax.random.normal(key, shape, dtype)
    count, size = math.prod(shape), _SHORTEST
    while size < count:
        size *= 8
    return jnp.asarray(np.asarray(_row(key, size))[:count].reshape(shape))


@functools.partial(jax.jit, static_argnums=1)
def _row(key: Any, size: int) -> Any:
    return jax.random.normal(key, (size,))
