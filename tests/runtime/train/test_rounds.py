"""What a run says of a router that fills some experts: once, when it does so in most steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from meshwright.runtime.train.rounds import RoundsWatch, exchange_axes
from meshwright.sharding import Plan, plan
from meshwright.sharding.ops.experts import experts


def said(loads: list[float]) -> list[str]:
    found: list[str] = []
    watch = RoundsWatch(("expert",), found.append)
    for step, load in enumerate(loads, start=1):
        watch.write({"step": step, "loss": 1.0, "expert_load": load})
    watch.close()
    return found


def test_more_than_one_round_in_most_steps_is_said_once() -> None:
    (words,) = said([1.1] * 9 + [2.0] * 60)
    assert words.startswith("note: in 11 of 20 steps up to 20 the fullest expert had more than 1.25 times")
    assert "over expert" in words
    assert said([1.2] * 100) == []
    # Now and then is no news.
    assert said([1.1, 1.1, 2.0] * 40) == []


@pytest.mark.parametrize(
    ("mesh", "axes"), [({"expert": 4, "data": 2}, ("expert",)), ({"tensor": 8}, ()), ({"fsdp": 8}, ())]
)
def test_tokens_are_exchanged_over_the_axes_of_experts_that_cut_rows(
    mesh: dict[str, int], axes: tuple[str, ...]
) -> None:
    assert exchange_axes(planned(mesh)) == axes


def planned(mesh: dict[str, int]) -> Plan:
    def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
        return jnp.mean(experts(x, weights, chosen, up=params["up"], down=params["down"]))

    shapes = {"router": (16, 8), "up": (8, 16, 32), "down": (8, 32, 16)}
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((8, 16, 16), "float32")
    return plan(loss, params, x, topology="cpu:8", mesh=mesh)
