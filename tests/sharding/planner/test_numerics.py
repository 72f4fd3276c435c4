"""Planned functions as compiled, and random programs under random layouts."""

from __future__ import annotations

from collections.abc import Callable

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled_memory import measure
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshwright.sharding import Plan, Topology
from meshwright.sharding.planner.build import record_of
from meshwright.sharding.planner.declared import Declared
from meshwright.sharding.planner.inputs import Problem

# Rows and widths are multiples of 8, so that most of them can be cut.
ROWS, LENGTH, WIDTH = 16, 8, 16

Array = jax.Array
Weights = dict[str, Array]


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("mlp", 0.15),
        ("lstm", 0.16),
        pytest.param("decoder", 0.18, marks=pytest.mark.slow),
        pytest.param("state_space", 0.19, marks=pytest.mark.slow),
        pytest.param("encoder_decoder", 0.25, marks=pytest.mark.slow),
        pytest.param("vision_transformer", 0.28, marks=pytest.mark.slow),
        pytest.param("resnet", 0.28, marks=pytest.mark.slow),
        pytest.param("graph_net", 0.3, marks=pytest.mark.slow),
        pytest.param("mixture_of_experts", 0.32, marks=pytest.mark.slow),
    ],
)
def test_a_device_holds_little_more_than_its_share(name: str, most: float) -> None:
    found = measure(name, 8, guard=False)
    assert found["share"] < most
    assert found["replicated"] < 0.02


@pytest.mark.devices(8)
@pytest.mark.slow
def test_a_step_that_may_keep_its_old_state_holds_its_gradients_at_once_and_no_more() -> None:
    """Whether to keep it is known when all gradients are, which without the guard are used up one by one."""
    guarded, plain = measure("lstm", 8), measure("lstm", 8, guard=False)
    gradients = 4 * guarded["parameters"] / 8
    assert 0 <= guarded["device_bytes"] - plain["device_bytes"] < 1.1 * gradients


def product(x: Array, w: Weights) -> Array:
    return jnp.tanh(jnp.einsum("bsd,df->bsf", x, w["square"]))


def heads(x: Array, w: Weights) -> Array:
    split = x.reshape(*x.shape[:2], 4, WIDTH // 4)
    scores = jax.nn.softmax(jnp.einsum("bshd,bthd->bhst", split, split), axis=-1)
    return jnp.einsum("bhst,bthd->bshd", scores, split).reshape(x.shape) + x


def wide(x: Array, w: Weights) -> Array:
    return x + jax.nn.silu(x @ w["up"]) @ w["down"]


def looked_up(x: Array, w: Weights) -> Array:
    index = (jnp.abs(x[..., 0]) * 7).astype(jnp.int32) % w["table"].shape[0]
    return x + w["table"][index]


def walked(x: Array, w: Weights) -> Array:
    def turn(carry: Array, row: Array) -> tuple[Array, Array]:
        carry = jnp.tanh(carry @ w["square"] + row)
        return carry, carry

    return jax.lax.scan(turn, jnp.zeros((x.shape[0], WIDTH)), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def layered(x: Array, w: Weights) -> Array:
    return jax.lax.scan(lambda y, one: (y + jnp.sin(y @ one), None), x, w["stack"])[0]


def checked(x: Array, w: Weights) -> Array:
    return jax.checkpoint(lambda y: jnp.cos(y @ w["square"]))(x)


def chosen(x: Array, w: Weights) -> Array:
    return jax.lax.cond(jnp.sum(w["gain"]) > 0, lambda y: y * w["gain"], lambda y: y - w["gain"], x)


STEPS: dict[str, Callable[[Array, Weights], Array]] = {
    "product": product,
    "heads": heads,
    "wide": wide,
    "looked_up": looked_up,
    "walked": walked,
    "layered": layered,
    "checked": checked,
    "chosen": chosen,
    "summed": lambda x, w: jnp.cumsum(x, axis=1) / LENGTH,
    "sorted": lambda x, w: jnp.sort(x, axis=-1) + w["gain"],
    "shifted": lambda x, w: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1] * w["gain"],
    "joined": lambda x, w: jnp.concatenate([x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], axis=-1),
    "turned": lambda x, w: (x.reshape(-1, WIDTH) @ w["square"].T).reshape(x.shape),
    "normed": lambda x, w: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * w["gain"],
    "best": lambda x, w: x * (x >= jax.lax.top_k(x, 4)[0][..., -1:]),
    "mapped": lambda x, w: jax.vmap(lambda row: row @ w["square"] - row)(x),
}


def weights(key: Array) -> Weights:
    shapes = {
        "square": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
        "table": (32, WIDTH),
        "stack": (2, WIDTH, WIDTH),
        "gain": (WIDTH,),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: draws.normal(one, shape) / 4 for one, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def program(names: list[str]) -> Callable[[Weights, Array], Array]:
    def loss(w: Weights, x: Array) -> Array:
        for name in names:
            x = STEPS[name](x, w)
        used = sum(jnp.mean(jnp.square(one)) for one in w.values())
        return jnp.mean(jnp.square(x)) + 1e-3 * used

    return loss


def holds(names: list[str], pick: int) -> None:
    """Check a program's values and gradients under one of the layouts that the search would consider."""
    # In float64: several of the steps make differences of rounding in float32 as large as the bounds.
    with jax.enable_x64(True):
        loss = program(names)
        params = weights(jax.random.key(0))
        batch = draws.normal(jax.random.key(1), (ROWS, LENGTH, WIDTH))
        where = Topology.parse("cpu:8")
        problem = Problem(loss=loss, params=params, batch=batch, optimizer=optax.sgd(0.1), names=None)
        candidates = list(problem.space(where, Declared()).candidates())
        made = Plan.of(record_of(problem.program, where, candidates[pick % len(candidates)]))
        mesh = made.make_mesh()
        placed = jax.device_put(
            (params, batch), (made.shardings(params, mesh), made.shardings(batch, mesh, "batch"))
        )
        expected = jax.jit(jax.value_and_grad(loss))(params, batch)
        got = jax.jit(jax.value_and_grad(made.apply(loss)))(*placed)
        np.testing.assert_allclose(got[0], expected[0], rtol=2e-6)
        for name, gradient in expected[1].items():
            error = np.abs(np.asarray(got[1][name]) - np.asarray(gradient)).max()
            assert error <= 2e-5 * max(np.abs(gradient).max(), 1e-3), name


@pytest.mark.numerics
@pytest.mark.devices(8)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4), pick=st.integers(0, 10_000))
def test_random_programs_keep_their_values(names: list[str], pick: int) -> None:
    holds(names, pick)


@pytest.mark.numerics
@pytest.mark.slow
@pytest.mark.devices(8)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5), pick=st.integers(0, 10_000))
def test_many_random_programs_keep_their_values(names: list[str], pick: int) -> None:
    holds(names, pick)
