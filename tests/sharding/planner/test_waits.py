"""What is said of collectives that a compiler runs by themselves."""

import jax
import jax.numpy as jnp
import pytest
from meshwright.sharding import plan


def loss(params, x):
    def layer(x, p):
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"], None

    return jnp.mean(jax.lax.scan(layer, x, params)[0].astype(jnp.float32))


@pytest.mark.parametrize(("topology", "said"), [("v5p:2x2x2", True), ("v6e:2x4", True), ("v5e:2x4", False)])
def test_a_plan_says_what_a_step_takes_where_each_gather_is_waited_for(topology, said):
    shape = jax.ShapeDtypeStruct
    params = {
        "up": shape((8, 4096, 16384), jnp.bfloat16),
        "down": shape((8, 16384, 4096), jnp.bfloat16),
    }
    made = plan(loss, params, shape((8192, 4096), jnp.bfloat16), topology=topology, mesh={"fsdp": 8})
    (note,) = [note for note in made.notes if "waits for each" in note] or [""]
    assert bool(note) == said
    if said:
        words = note.rpartition("waits for each: ")[2].replace("a step, not ", "").split()
        (waited, unit, hidden, other) = words
        assert unit == other
        assert float(waited) > float(hidden)
