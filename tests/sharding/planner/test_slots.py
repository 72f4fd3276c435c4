"""The optimizer's arrays in a plan's estimate: what a device then holds, and a note of those whole."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
from meshwright.sharding import plan

pytestmark = pytest.mark.numerics


def init(key: jax.Array) -> dict[str, Any]:
    return {
        "up": draws.normal(key, (48, 128)),
        "down": draws.normal(key, (128, 48)),
        "bias": jnp.zeros(48),
    }


def loss(params: Any, x: Any) -> Any:
    return jnp.square(jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]).mean()


X = jax.ShapeDtypeStruct((16, 48), jnp.float32)
OPTIMIZERS = {
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=16),
    "adafactor, momentum": optax.adafactor(1e-3, min_dim_size_to_factor=16, momentum=0.9),
    "sm3": optax.sm3(1e-3),
    "muon": optax.contrib.muon(1e-3),
    "histories": optax.lbfgs(1e-3, memory_size=3, linesearch=None),
    "flat": optax.flatten(optax.adam(1e-3)),
    "some": optax.masked(optax.adam(1e-3), {"up": True, "down": False, "bias": False}),
    "adamw": optax.adamw(1e-3),
    "sgd": optax.sgd(1e-3),
}


@pytest.mark.devices(8)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=["fsdp", "fsdp tensor"])
def test_the_estimate_has_the_bytes_that_a_device_holds(
    optimizer: optax.GradientTransformation, mesh: dict[str, int]
) -> None:
    params = jax.eval_shape(init, jax.random.key(0))
    found = plan(loss, params, X, topology="cpu:8", optimizer=optimizer, mesh=mesh)
    state = found.init(init, jax.random.key(0))["optimizer"]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    said = found.estimate
    assert said is not None
    # Counters, of four bytes each, are not counted where all else lies as parameters do.
    assert said.memory["optimizer"] == pytest.approx(held, abs=8)
    assert said.peak_bytes == pytest.approx(sum(said.memory.values()))


def test_an_array_that_matters_and_lies_whole_is_said() -> None:
    def averages(size: int) -> optax.GradientTransformation:
        """Keep a row of averages for each parameter, in which nothing may be cut."""

        def start(params: Any) -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], size), leaf.dtype), params)

        return optax.GradientTransformation(start, lambda updates, state, params=None: (updates, state))

    params = {"up": jax.ShapeDtypeStruct((63, 128), jnp.float32)}
    rows = jax.ShapeDtypeStruct((16, 63), jnp.float32)

    def of(size: int) -> tuple[str, ...]:
        found = plan(
            lambda p, x: jnp.square(x @ p["up"]).mean(),
            params,
            rows,
            topology="cpu:8",
            optimizer=averages(size),
            mesh={"fsdp": 8},
        )
        return tuple(note for note in found.notes if "optimizer" in note)

    assert of(3) == (
        "the optimizer's up (63, 3) lies whole on every device: fsdp=8 divides no dimension of it",
    )
    # Less than a hundredth of the parameters, and one that the axis cuts.
    assert of(1) == ()
    assert of(128) == ()


def test_an_array_without_the_dimension_that_is_cut_is_said() -> None:
    params = {"up": jax.ShapeDtypeStruct((64, 32), jnp.float32)}

    found = plan(
        lambda p, x: jnp.square(x @ p["up"]).mean(),
        params,
        jax.ShapeDtypeStruct((16, 64), jnp.float32),
        topology="cpu:8",
        optimizer=optax.adafactor(1e-3, min_dim_size_to_factor=16),
        mesh={"fsdp": 8},
    )
    said = [note for note in found.notes if "optimizer" in note]
    assert len(said) == 1
    assert "/up (32,) lies whole on every device: it lacks the dimension of up that fsdp=8 cuts" in said[0]
