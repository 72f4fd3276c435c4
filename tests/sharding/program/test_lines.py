"""Errors and notes name the user's own line, not a library's."""

import jax
import jax.numpy as jnp
from flax import nnx
from meshwright.sharding.program import trace


def test_a_layer_of_a_library_stands_for_the_line_that_calls_it() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def loss(params, batch):
        return model(batch).sum() * params

    shapes = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((8, 4), jnp.float32)
    program = trace(loss, *shapes)
    line = loss.__code__.co_firstlineno + 1
    places = {where for _, where in program.located()}
    assert places == {f"{__file__}:{line} (loss)"}
