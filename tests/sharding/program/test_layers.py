"""Which loops are layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from meshwright.sharding.program import trace
from meshwright.sharding.program.layers import is_checkpointed, layer_scans, saved_values

WEIGHTS = {"up": jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)}
ROWS = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def over_layers(layer: Any) -> Any:
    def loss(params: Any, x: Any) -> Any:
        return jnp.square(lax.scan(lambda x, w: (layer(x, w), None), x, params["up"])[0]).mean()

    return loss


def convolved(x: Any, w: Any) -> Any:
    return lax.conv(x[None, None], w[None, None, :3, :3], (1, 1), "SAME")[0, 0]


def grouped(x: Any, w: Any) -> Any:
    return lax.ragged_dot(x, w[None], jnp.array([4], jnp.int32))


def scaled(x: Any, w: Any) -> Any:
    ones = jnp.ones((4, 1)), jnp.ones((1, 8))
    numbers = (((1,), (0,)), ((), ()))
    return lax.scaled_dot(x, w, lhs_scale=ones[0], rhs_scale=ones[1], dimension_numbers=numbers).astype(
        x.dtype
    )


@pytest.mark.parametrize("layer", [jnp.matmul, convolved, grouped, scaled])
def test_a_loop_with_any_product_is_layers(layer: Any) -> None:
    (scan,) = layer_scans(trace(over_layers(layer), WEIGHTS, ROWS).scope)
    assert scan.trips == 3
    assert not is_checkpointed(scan)


def test_a_loop_without_a_product_is_no_layers() -> None:
    assert not list(layer_scans(trace(over_layers(lambda x, w: x + w[0]), WEIGHTS, ROWS).scope))


@pytest.mark.parametrize("layer", [jnp.matmul, grouped])
def test_a_product_is_named_after_its_parameter(layer: Any) -> None:
    assert list(saved_values(trace(over_layers(layer), WEIGHTS, ROWS))) == ["up"]


def test_layers_that_are_checkpointed_already_are_told() -> None:
    (scan,) = layer_scans(trace(over_layers(jax.checkpoint(jnp.matmul)), WEIGHTS, ROWS).scope)
    assert is_checkpointed(scan)
