"""Programs run by NumPy give what JAX gives, to the bit where nothing is rounded."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import interpreted


def test_sorts_by_several_keys_and_bits_of_another_width() -> None:
    def function(x: jax.Array, y: jax.Array, places: jax.Array) -> list[jax.Array]:
        halves = jax.lax.bitcast_convert_type(y, jnp.uint16)
        whole = jax.lax.bitcast_convert_type(halves, jnp.float32)
        return [*jax.lax.sort((jnp.round(x), y, places), num_keys=2, dimension=1), halves, whole]

    x, y = jax.random.normal(jax.random.key(0), (2, 3, 9))
    arguments = (x, y, jnp.arange(27).reshape(3, 9))
    traced = jax.make_jaxpr(function)(*arguments)
    found = interpreted.interpreted(traced, [np.asarray(one) for one in arguments])
    for one, wanted in zip(found, function(*arguments), strict=True):
        np.testing.assert_array_equal(one, wanted)
