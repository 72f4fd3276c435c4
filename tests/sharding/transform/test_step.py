"""The planned training step against the plain one: same numbers, state in shards, metrics complete."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.models import mlp
from meshwright.runtime.config import parse
from meshwright.runtime.train import optimizer
from meshwright.sharding import UserError, declare, train_step
from meshwright.sharding.transform.step import Step, with_aux

pytestmark = pytest.mark.numerics

ROWS, SEQUENCE, STEPS = 16, 8, 5
MODEL = mlp()
ABSTRACT = {key: jax.ShapeDtypeStruct((ROWS, SEQUENCE), jnp.int32) for key in ("tokens", "targets")}


def batches() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {
            "tokens": random.integers(0, 16, (ROWS, SEQUENCE), dtype=np.int32),
            "targets": random.integers(-1, 16, (ROWS, SEQUENCE), dtype=np.int32),
        }
        for _ in range(STEPS)
    ]


def adamw() -> optax.GradientTransformation:
    return optimizer.build(
        parse({"optimizer": {"clip_norm": 0.5}}).optimizer, optax.constant_schedule(1e-2), MODEL.names
    )


def sharded_step(mesh_axes: dict[str, int], made: Any, devices: Any = None, **how: Any) -> Step:
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    plan = declare(MODEL.loss, params, ABSTRACT, topology="cpu:8", mesh=mesh_axes, names=MODEL.names, **how)
    return train_step(
        plan,
        MODEL.loss,
        MODEL.init,
        ABSTRACT,
        made,
        mesh=plan.make_mesh(devices),
        measure=lambda state: {"learning_rate": 0.1 * state["step"]},
    )


def unsharded(made: Any) -> tuple[list[dict[str, float]], Any]:
    """Metrics of every step and the last parameters, by plain JAX."""

    @jax.jit
    def update(params: Any, moments: Any, batch: Any) -> Any:
        (loss, aux), gradients = jax.value_and_grad(MODEL.loss, has_aux=True)(params, batch)
        changes, moments = made.update(gradients, moments, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), **aux}
        return optax.apply_updates(params, changes), moments, metrics

    params = jax.jit(MODEL.init)(jax.random.key(7))
    moments, found = made.init(params), []
    for batch in batches():
        params, moments, metrics = update(params, moments, batch)
        found.append({key: float(value) for key, value in metrics.items()})
    return found, jax.device_get(params)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [({"fsdp": 8}, 2), ({"data": 4, "tensor": 2}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 4)],
)
def test_several_steps_give_the_metrics_of_unsharded_training(
    mesh: dict[str, int], microbatches: int
) -> None:
    expected, last = unsharded(adamw())
    step = sharded_step(mesh, adamw(), microbatches=microbatches)
    state = step.init(jax.random.key(7))
    for number, (batch, reference) in enumerate(zip(batches(), expected, strict=True)):
        state, metrics = step.update(state, jax.device_put(batch, step.batch))
        assert set(metrics) == {*reference, "learning_rate"}
        assert float(metrics["learning_rate"]) == pytest.approx(0.1 * number)
        for key, value in reference.items():
            np.testing.assert_allclose(float(metrics[key]), value, rtol=1e-5, err_msg=f"{key} of {number}")
    assert int(state["step"]) == STEPS
    for got, wanted in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
def test_parameters_and_moments_are_made_and_kept_in_shards() -> None:
    step = sharded_step({"fsdp": 4, "tensor": 2}, adamw())
    compiled = step.init.lower(jax.random.key(0)).compile()
    state = step.init(jax.random.key(0))
    batch = jax.device_put(batches()[0], step.batch)
    for _ in range(2):
        tables = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1]
        assert len(tables) == 3 * len(jax.tree.leaves(state["params"]))
        for leaf in tables:
            # Rows of the unembedding are of the hidden layer, so that only `tensor` shards it.
            parts = 2 if leaf.shape == state["params"]["unembed"].shape else 8
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // parts}
        for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(step.abstract_state), strict=True):
            assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
            assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
        state, _ = step.update(state, batch)
    held = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().output_size_in_bytes < held + 256


@pytest.mark.devices(8)
def test_first_values_do_not_depend_on_the_mesh() -> None:
    expected = jax.device_get(jax.jit(MODEL.init)(jax.random.key(3)))
    for mesh in ({"data": 8}, {"fsdp": 4, "tensor": 2}):
        state = sharded_step(mesh, adamw()).init(jax.random.key(3))
        for got, wanted in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.devices(8)
def test_the_state_is_donated() -> None:
    step = sharded_step({"fsdp": 8}, adamw())
    state = step.init(jax.random.key(0))
    step.update(state, jax.device_put(batches()[0], step.batch))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state["params"]))


@pytest.mark.devices(8)
def test_evaluation_is_the_loss_of_the_parameters_given() -> None:
    step = sharded_step({"data": 4, "tensor": 2}, adamw())
    state = step.init(jax.random.key(7))
    batch = batches()[0]
    value, aux = step.evaluate(state["params"], jax.device_put(batch, step.batch))
    expected, wanted = MODEL.loss(jax.device_get(state["params"]), batch)
    np.testing.assert_allclose(float(value), float(expected), rtol=1e-6)
    assert float(aux["weight"]) == float(wanted["weight"])


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "name",
    [pytest.param("adafactor", marks=pytest.mark.slow), pytest.param("lion", marks=pytest.mark.slow), "muon"],
)
def test_other_optimisers_go_the_way_of_unsharded_training(name: str) -> None:
    config = parse({"optimizer": {"name": name}}).optimizer
    made = optimizer.build(config, optax.constant_schedule(1e-3), MODEL.names)
    expected, _ = unsharded(made)
    step = sharded_step({"data": 2, "fsdp": 2, "tensor": 2}, made)
    state = step.init(jax.random.key(7))
    for batch, reference in zip(batches(), expected, strict=True):
        state, metrics = step.update(state, jax.device_put(batch, step.batch))
        np.testing.assert_allclose(float(metrics["loss"]), reference["loss"], rtol=1e-4)


@pytest.mark.devices(8)
def test_the_mesh_that_is_given_is_the_one_used() -> None:
    step = sharded_step({"fsdp": 8}, optax.sgd(0.1), devices=list(reversed(jax.devices())))
    _, metrics = step.update(step.init(jax.random.key(7)), jax.device_put(batches()[0], step.batch))
    expected, _ = unsharded(optax.sgd(0.1))
    np.testing.assert_allclose(float(metrics["loss"]), expected[0]["loss"], rtol=1e-6)


@pytest.mark.devices(8)
def test_other_parameters_than_planned_are_refused() -> None:
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    plan = declare(MODEL.loss, params, ABSTRACT, topology="cpu:8", mesh={"data": 8}, names=MODEL.names)
    longer = {key: jax.ShapeDtypeStruct((ROWS, 2 * SEQUENCE), jnp.int32) for key in ABSTRACT}
    with pytest.raises(UserError, match=r"batch array 'tar?.*' has shape \(16, 16\)|'tokens' has shape"):
        train_step(plan, MODEL.loss, MODEL.init, longer, optax.sgd(0.1), mesh=plan.make_mesh())
    with pytest.raises(UserError, match="the plan has a parameter 'up' that the program lacks"):
        train_step(
            plan,
            MODEL.loss,
            lambda key: {name: leaf for name, leaf in MODEL.init(key).items() if name != "up"},
            ABSTRACT,
            optax.sgd(0.1),
            mesh=plan.make_mesh(),
        )


def test_a_loss_with_or_without_aux_values() -> None:
    assert with_aux(1.0) == (1.0, {})
    assert with_aux((1.0, {"weight": 2})) == (1.0, {"weight": 2})
