"""Which experts a loss's routers choose: of every layer in a scan, and by types."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshwright.sharding.ops.experts import experts
from meshwright.sharding.transform.choices import chosen_experts, other_choices

LAYERS, EXPERTS, EMBED, CHOICES = 2, 8, 16, 2


def loss_in(dtype: Any) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, own: Any) -> Any:
            own = jax.tree.map(lambda one: one.astype(dtype), own)
            weights, chosen = jax.lax.top_k(x @ own["router"], CHOICES)
            return x + experts(x, weights, chosen, up=own["up"], down=own["up"].mT), chosen

        x, chosen = jax.lax.scan(layer, batch.astype(dtype), params)
        return jnp.square(x).sum(), chosen

    return loss


@pytest.mark.numerics
def test_every_layers_choices_are_told_and_counted_where_they_turn() -> None:
    keys = iter(jax.random.split(jax.random.key(0), 3))
    params = {
        "router": draws.normal(next(keys), (LAYERS, EMBED, EXPERTS)),
        "up": 0.1 * draws.normal(next(keys), (LAYERS, EXPERTS, EMBED, 8)),
    }
    batch = draws.normal(next(keys), (16, 64, EMBED))
    wide, narrow = (chosen_experts(loss_in(kind), params, batch) for kind in (jnp.float32, jnp.bfloat16))
    assert (np.stack(wide) == jax.jit(loss_in(jnp.float32))(params, batch)[1]).all()
    turned, tokens = other_choices(wide, narrow)
    assert tokens == LAYERS * 16 * 64
    assert 0 < turned < tokens / 50
    assert other_choices(wide, [one[..., ::-1] for one in wide]) == (0, tokens)
