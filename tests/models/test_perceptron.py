"""The perceptron is a model like any other, and learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.models import mlp
from meshwright.models.perceptron import MlpConfig
from meshwright.sharding import UserError

pytestmark = pytest.mark.numerics


def test_it_learns_which_token_follows_which() -> None:
    model = mlp(MlpConfig(vocab=8))
    params = model.init(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 8, (4, 16)), jnp.int32)
    batch = {"tokens": tokens, "targets": (tokens + 3) % 8}
    step = jax.jit(jax.value_and_grad(lambda p: model.loss(p, batch)[0]))
    first, _ = step(params)
    for _ in range(60):
        loss, gradients = step(params)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients)
    assert loss < first / 4
    assert np.array_equal(jnp.argmax(model.logits(params, tokens), -1), batch["targets"])


def test_its_record_is_consistent() -> None:
    model = mlp()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert model.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert all(len(model.names[name]) == leaf.ndim for name, leaf in shapes.items())
    with pytest.raises(UserError, match="vocab=0 must be at least 1"):
        MlpConfig(vocab=0)
