"""Random arrays of tests are those of `jax.random`."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from draws import normal


@pytest.mark.numerics
@pytest.mark.parametrize("shape", [(), (3, 5), (4096,), (7, 600)], ids=str)
def test_they_are_what_jax_draws(shape: tuple[int, ...]) -> None:
    key = jax.random.key(3)
    expected = np.asarray(jax.random.normal(key, shape))
    np.testing.assert_array_equal(np.asarray(normal(key, shape)), expected)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda key: normal(key, shape))(key)), expected)
