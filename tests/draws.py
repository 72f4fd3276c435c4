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
# XLA's optimisations take a second and more over the program that draws an array of several dimensions.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def normal(key: Any, shape: Sequence[int] = (), dtype: Any = None) -> Any:
    """Return what `jax.random.normal` does without XLA's optimisations, which change last bits.

    JAX draws each element by its place in the array, so that a row begins with what a shorter one of its key
    has. In a function that is being traced this is `jax.random.normal` itself.
    """
    plain = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == () and dtype is None
    if isinstance(key, jax.core.Tracer) or not plain:
        return jax.random.normal(key, shape) if dtype is None else jax.random.normal(key, shape, dtype)
    count, size = math.prod(shape), _SHORTEST
    while size < count:
        size *= 8
    return jnp.asarray(np.asarray(_row(key, size))[:count].reshape(shape))


@functools.partial(jax.jit, static_argnums=1, compiler_options=_QUICK)
def _row(key: Any, size: int) -> Any:
    return jax.random.normal(key, (size,))
