"""Calls of `ops.experts` carried out by a plan: the values and gradients of the user's own function."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from meshwright.sharding import UserError, declare, plan
from meshwright.sharding.ops.experts import experts

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

LAYERS, EXPERTS, EMBED, MLP, ROWS, SEQUENCE = 2, 8, 16, 24, 16, 8
NAMES = {
    "router": ("layers", "embed", "scores"),
    "gate": ("layers", "experts", "embed", "mlp"),
    "up": ("layers", "experts", "embed", "mlp"),
    "down": ("layers", "experts", "mlp", "embed"),
}


def loss(params: Any, batch: Any) -> Any:
    def layer(x: Any, own: Any) -> tuple[Any, None]:
        weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ own["router"]), 2)
        matrices = {name: own[name] for name in ("gate", "up", "down")}
        return x + experts(x, weights, chosen, **matrices), None

    x, _ = jax.lax.scan(layer, batch["x"], params)
    return jnp.mean(jnp.square(x - batch["y"]))


@functools.cache
def problem() -> tuple[Any, Any, Any]:
    keys = iter(jax.random.split(jax.random.key(1), 8))
    sizes = {"layers": LAYERS, "experts": EXPERTS, "embed": EMBED, "mlp": MLP, "scores": EXPERTS}
    params = {
        name: draws.normal(next(keys), tuple(sizes[dim] for dim in dims)) / 3 for name, dims in NAMES.items()
    }
    batch = {name: draws.normal(next(keys), (ROWS, SEQUENCE, EMBED)) for name in ("x", "y")}
    return params, batch, jax.jit(jax.value_and_grad(loss))(params, batch)


def check(how: Any = plan, **declared: Any) -> Any:
    params, batch, (value, gradients) = problem()
    made = how(
        loss,
        params,
        batch,
        topology="cpu:8",
        optimizer=optax.sgd(0.1),
        names=NAMES,
        **declared,
    )
    mesh = made.make_mesh()
    placed = jax.device_put(
        (params, batch), (made.shardings(params, mesh), made.shardings(batch, mesh, "batch"))
    )
    found, learnt = jax.jit(jax.value_and_grad(made.apply(loss)))(*placed)
    assert abs(found - value) <= 1e-6 * abs(value)
    for name, one in gradients.items():
        error = np.linalg.norm(np.asarray(learnt[name]) - one) / np.linalg.norm(one)
        assert error <= 1e-5, (name, error)
    return made


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "expert": 2, "tensor": 2},
        pytest.param({"data": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 4}, marks=pytest.mark.slow),
    ],
)
def test_experts_keep_their_values_on_any_mesh(mesh: dict[str, int]) -> None:
    made = check(mesh=mesh)
    if "expert" in mesh:
        assert made.params["up"].spec[1] == "expert"


@pytest.mark.once("sharding/transform/test_experts.py")
@pytest.mark.parametrize(
    "changes",
    [
        {"microbatches": 2, "remat": "full"},
        pytest.param(
            {"mesh": {"stage": 2, "expert": 2, "fsdp": 2}, "microbatches": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"rules": {"sequence": "context"}, "mesh": {"expert": 4, "context": 2}}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"rules": {"experts": "tensor"}, "mesh": {"data": 4, "tensor": 2}}, marks=pytest.mark.slow
        ),
        pytest.param({"rules": {"batch": "data"}}, marks=pytest.mark.slow),
    ],
)
def test_experts_keep_their_values_in_parts_and_under_rules(changes: dict[str, Any]) -> None:
    check(**{"mesh": {"data": 2, "expert": 4}, **changes})


@pytest.mark.parametrize(
    "declared",
    [
        {"mesh": {"stage": 2, "expert": 4}, "microbatches": 1},
        {"mesh": {"data": 2, "expert": 4}, "rules": {"batch": ("data", "expert")}},
    ],
    ids=["default", "batch"],
)
def test_a_declared_axis_of_experts_has_rows_and_experts(declared: dict[str, Any]) -> None:
    """As the search lays them: nothing of the experts is gathered."""
    params, batch, _ = problem()
    made = declare(loss, params, batch, names=NAMES, topology="cpu:8", optimizer=optax.sgd(0.1), **declared)
    assert made.dims["experts"].axes == ("expert",)
    assert "expert" in made.dims["batch"].axes
    assert "expert" in made.batch["x"].spec[0]


@pytest.mark.slow
def test_a_declared_axis_of_experts_beside_stages_keeps_values() -> None:
    check(declare, mesh={"stage": 2, "expert": 4}, microbatches=1)


def test_an_axis_of_experts_needs_no_names() -> None:
    params, batch, _ = problem()
    made = declare(loss, params, batch, topology="cpu:8", mesh={"data": 2, "expert": 4})
    assert [axes for axes in made.params["up"].spec if axes] == ["expert"]
    assert made.batch["x"].spec[0] == ("data", "expert")
    with pytest.raises(UserError, match=f"expert=3 does not divide {EXPERTS} experts; nearest: 2 or 4"):
        declare(loss, params, {n: x[:6] for n, x in batch.items()}, topology="cpu:3", mesh={"expert": 3})


def products(jaxpr: Any) -> int:
    """How many products a program has, those of all loops and calls once."""
    inner = (one for eqn in jaxpr.eqns for one in core.jaxprs_in_params(eqn.params))
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(map(products, inner))


def test_a_backward_pass_multiplies_again_what_a_plan_does_not_keep() -> None:
    """Of experts two products, up and gate: no gradient reads what the last one gives."""
    params, batch, _ = problem()
    counted = {}
    for name, remat in {
        "full": "full",
        "up": {"router": "device", "up": "device"},
        "both": {"router": "device", "up": "device", "gate": "device"},
        "none": "none",
    }.items():
        declared: dict[str, Any] = {"mesh": {"data": 2, "expert": 4}, "remat": remat, "names": NAMES}
        made = plan(loss, params, batch, topology="cpu:8", optimizer=optax.sgd(0.1), **declared)
        counted[name] = products(jax.make_jaxpr(jax.grad(made.apply(loss)))(params, batch).jaxpr)
    assert counted["full"] == counted["none"] + 3
    assert counted["up"] == counted["none"] + 1
    assert counted["both"] == counted["none"]


def test_a_search_finds_an_axis_for_experts() -> None:
    """Few tokens beside many experts: on H100s, to send tokens is less than to gather and reduce experts."""
    shapes = {
        "router": (4, 512, 64),
        "gate": (4, 64, 512, 2048),
        "up": (4, 64, 512, 2048),
        "down": (4, 64, 2048, 512),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    batch = dict.fromkeys(("x", "y"), jax.ShapeDtypeStruct((64, 128, 512), jnp.float32))
    made = plan(loss, params, batch, topology="h100:8", optimizer=optax.adam(1e-3), names=NAMES)
    assert made.mesh["expert"] > 1
    assert made.params["up"].spec[1] == "expert"
    assert made.estimate is not None
    assert "all_to_all/expert" in made.estimate.time


@pytest.mark.slow
@pytest.mark.numerics(False)
@pytest.mark.parametrize(
    ("topology", "embed", "mlp"),
    # The first as scheduled; the second in the sizes of Mixtral, which ships for such chips: machine code for
    # whole tiles.
    [("v5e:2x4", 256, 128), ("v5p:2x2x1", 4096, 14336), ("h100:8", 256, 128)],
)
def test_a_compiled_step_has_the_products_of_an_even_router(topology: str, embed: int, mlp: int) -> None:
    """Of kernels that have room for more rows, and beside loops whose turns only a run knows."""
    shapes = {
        "router": (2, embed, 8),
        "gate": (2, 8, embed, mlp),
        "up": (2, 8, embed, mlp),
        "down": (2, 8, mlp, embed),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    batch = dict.fromkeys(("x", "y"), jax.ShapeDtypeStruct((32, 128, embed), jnp.bfloat16))
    optimizer = optax.sgd(0.1)
    declared: dict[str, Any] = {"names": NAMES, "mesh": {"expert": -1}, "remat": "none"}
    made = plan(loss, params, batch, topology=topology, optimizer=optimizer, **declared)
    if topology == "h100:8":
        made = dataclasses.replace(made, kernels={**made.kernels, "experts": {"implementation": "mosaic"}})
    assert "experts" in made.kernels
    proof = made.verify(loss, params, batch, optimizer, quick=topology == "v5e:2x4").proof
    assert proof is not None
    each = 32 * 128 / made.mesh["expert"] * 2
    assert proof.flops == pytest.approx(3 * 2 * each * (2 * 3 * embed * mlp + embed * 8), rel=0.02)
    assert not any(one.kind in ("unknown_trip_count", "unpriced_kernel") for one in proof.findings)
