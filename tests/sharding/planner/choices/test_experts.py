"""Kernels that multiply rows by their experts: which chips have one, and for which calls."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from meshwright.sharding import UserError, plan
from meshwright.sharding.ops.experts import experts
from meshwright.sharding.ops.kernels import check_kernels


def loss(params: Any, batch: Any) -> Any:
    x = batch["x"].astype(params["up"].dtype)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    return jnp.mean(experts(x, weights, chosen, up=params["up"], down=params["down"]).astype(jnp.float32))


def planned(topology: str, dtype: Any = jnp.bfloat16, mlp: int = 256, **how: Any) -> Any:
    shapes = {"router": (128, 8), "up": (8, 128, mlp), "down": (8, mlp, 128)}
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    batch = {"x": jax.ShapeDtypeStruct((8, 16, 128), jnp.float32)}
    return plan(loss, params, batch, topology=topology, optimizer=optax.sgd(0.1), mesh={"data": 8}, **how)


@pytest.mark.parametrize(
    ("topology", "kernel"),
    [("v5e:2x4", "megablox"), ("h100:8", None), ("a100:8", None), ("b200:8", None), ("cpu:8", None)],
)
def test_each_chip_multiplies_by_its_own_kernel(topology: str, kernel: str | None) -> None:
    assert planned(topology).kernels.get("experts", {}).get("implementation") == kernel


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": jnp.float16}, "megablox cannot be had: it takes bfloat16 or float32, not float16"),
        ({"mlp": 200}, "megablox cannot be had: it takes widths in multiples of 128, not 200"),
    ],
)
def test_what_a_kernel_does_not_take_is_said_and_left_to_xla(options: dict[str, Any], why: str) -> None:
    made = planned("v5e:2x4", **options)
    assert "experts" not in made.kernels
    assert any(why in note for note in made.notes)


def test_a_kernel_that_no_card_has_compared_waits_to_be_asked_for() -> None:
    made = planned("h100:8")
    (note,) = [note for note in made.notes if "has compared mosaic" in note]
    assert "kernels={'experts': {'implementation': 'mosaic'}}" in note


@pytest.mark.parametrize(
    ("topology", "word", "kernel"),
    [("h100:8", "mosaic", "mosaic"), ("v5e:2x4", "xla", None), ("v5e:2x4", "megablox", "megablox")],
)
def test_what_is_declared_of_experts_is_taken(topology: str, word: str, kernel: str | None) -> None:
    assert planned(topology, experts=word).kernels.get("experts", {}).get("implementation") == kernel


@pytest.mark.parametrize(
    ("topology", "how", "message"),
    [
        ("h100:8", {"experts": "mosiac"}, "experts='mosiac' is unknown; did you mean 'mosaic'"),
        ("v5e:2x4", {"experts": "mosaic"}, "not there on v5e; nearest: experts='megablox'"),
        ("cpu:8", {"experts": "megablox"}, "not there on cpu; nearest: experts='xla'"),
        ("v5e:2x4", {"experts": "megablox", "mlp": 200}, "multiples of 128, not 200; experts='xla' can"),
    ],
)
def test_a_declared_kernel_that_cannot_be_had_is_refused_with_the_nearest(
    topology: str, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        planned(topology, **how)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"implementation": "megablock"}, "'megablock' is no kernel; did you mean 'megablox'"),
        ({"implementation": "mosaic", "tile": 64}, "mosaic has no 'tile'"),
    ],
)
def test_a_plans_kernel_that_is_not_known_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_kernels({"experts": settings})


@pytest.mark.parametrize(
    ("topology", "what"),
    [("h100:8", "multiplies every row"), ("v5e:2x4", "for the gradient of its matrices")],
)
def test_a_dense_product_over_groups_is_said_with_its_line(topology: str, what: str) -> None:
    def ragged(params: Any, batch: Any) -> Any:
        return jnp.mean(jax.lax.ragged_dot(batch["x"], params["up"], batch["sizes"]))

    shape = jax.ShapeDtypeStruct
    batch = {"x": shape((64, 128), jnp.float32), "sizes": shape((8,), jnp.int32)}
    params = {"up": shape((8, 128, 256), jnp.float32)}
    made = plan(ragged, params, batch, topology=topology, optimizer=optax.sgd(0.1), mesh={"data": 8})
    note = next(one for one in made.notes if "lax.ragged_dot" in one)
    assert "test_experts.py" in note
    assert "all 8 groups" in note
    assert what in note
