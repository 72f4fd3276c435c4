"""What layers keep for gradients, by the estimate, is what the loop of JAX's own gradient stacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import plan

ROWS, WIDTH, LAYERS = 4096, 512, 4

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "gelu by erf": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "relu squared": lambda x: jax.nn.relu(x) ** 2,
    "relu beside its operand": lambda x: jax.nn.relu(x) + x,
    "relu6": jax.nn.relu6,
    "a choice": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "softplus": jax.nn.softplus,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "sine": jnp.sin,
    "a square": jnp.square,
    "a square beside its operand": lambda x: x * jnp.square(x),
    "a cube": lambda x: x + 0.1 * x**3,
    "a root": lambda x: jnp.sqrt(x * x + 1),
    "exp": lambda x: jnp.exp(-x),
    "a norm": lambda x: x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1),
}

# Arrays of zeros among what JAX keeps, which compilers do not: factors of a constant's gradient.
ZEROS = {"softplus": 1, "mish": 1}


def step(activation: Callable[[Any], Any]) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, weights: Any) -> tuple[Any, None]:
            return activation(x @ weights[0]) @ weights[1], None

        return jax.lax.scan(layer, batch["x"], params["layers"])[0].astype(jnp.float32).mean()

    params = {"layers": jax.ShapeDtypeStruct((LAYERS, 2, WIDTH, WIDTH), jnp.bfloat16)}
    return loss, params, {"x": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)}


def kept_by_jax(loss: Callable[[Any, Any], Any], params: Any, batch: Any) -> float:
    """Bytes of rows that the loop of the forward pass stacks."""
    gradient = jax.make_jaxpr(jax.grad(loss))(params, batch)
    forward = next(eqn for eqn in gradient.eqns if eqn.primitive.name == "scan")
    rows = [var.aval for var in forward.outvars if var.aval.shape[:2] == (LAYERS, ROWS)]
    return sum(aval.size * aval.dtype.itemsize for aval in rows)


def saved_by(activation: Callable[[Any], Any], **declared: Any) -> float:
    made = plan(*step(activation), topology="v5e:1x1", optimizer=optax.sgd(1e-3), microbatches=1, **declared)
    assert made.estimate is not None
    return made.estimate.memory["saved_activations"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_kept_of_each_activation_is_what_jax_keeps(name: str) -> None:
    activation = ACTIVATIONS[name]
    zeros = ZEROS.get(name, 0) * LAYERS * ROWS * WIDTH * 2
    saved = saved_by(activation, remat="none")
    assert saved == pytest.approx(kept_by_jax(*step(activation)) - zeros, rel=0.01)


def test_a_question_that_is_asked_twice_is_kept_once() -> None:
    """JAX keeps both masks of elu, which compilers make one."""
    saved = saved_by(jax.nn.elu, remat="none")
    assert saved == pytest.approx(kept_by_jax(*step(jax.nn.elu)) - LAYERS * ROWS * WIDTH, rel=0.01)


def test_questions_about_other_numbers_are_kept_apart() -> None:
    def twice(x: Any) -> Any:
        return jnp.where(x > 0, x, 0.1 * x) + jnp.where(x > 1, x, 0.2 * x)

    assert saved_by(twice, remat="none") == pytest.approx(kept_by_jax(*step(twice)), rel=0.01)


def test_a_mask_that_is_the_same_for_all_layers_is_not_kept_by_each() -> None:
    def masked(x: Any) -> Any:
        return jnp.where(jnp.arange(ROWS)[:, None] > 7, x, 0.0)

    assert saved_by(masked, remat="none") == saved_by(lambda x: 2 * x, remat="none")


def test_layers_that_are_run_again_keep_no_factors() -> None:
    for activation in (jax.nn.gelu, jax.nn.relu, jax.nn.softplus):
        assert saved_by(activation, remat="full") == saved_by(lambda x: x, remat="full")
