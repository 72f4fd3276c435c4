"""The planned training step against the plain one: same numbers, state in shards, metrics complete."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.models import mlp
from meshwright.runtime.config import parse
from meshwright.runtime.train import optimizer
from meshwright.sharding import UserError, declare, train_step
from meshwright.sharding.transform.step import Step, lasting, with_aux

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
    state = compiled(jax.random.key(0))
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


def fragile(params: Any, batch: Any) -> Any:
    """A loss that is finite unless the batch says otherwise; ``edge`` makes the gradient alone infinite."""
    found = jnp.mean((batch["x"] @ params["w"]) ** 2) * jnp.mean(batch["scale"])
    return found + jnp.mean(jnp.sqrt(jnp.maximum(batch["edge"] + 0 * jnp.sum(params["w"]), 0)))


def fragile_init(key: Any) -> Any:
    return {"w": draws.normal(key, (8, 8))}


def fragile_batch(scale: float = 1.0, edge: float = 1.0) -> Any:
    x = draws.normal(jax.random.key(1), (16, 8))
    return {"x": x, "scale": jnp.full((16,), scale, "float32"), "edge": jnp.full((16,), edge, "float32")}


def fragile_step(made: Any, **how: Any) -> Step:
    shapes = jax.eval_shape(fragile_init, jax.random.key(0))
    plan = declare(
        fragile, shapes, fragile_batch(), topology="cpu:8", mesh={"fsdp": 8}, rules={"*w": [None, "fsdp"]}
    )
    return train_step(plan, fragile, fragile_init, fragile_batch(), made, mesh=plan.make_mesh(), **how)


def values(state: Any) -> list[np.ndarray]:
    plain = jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf,
        lasting(state),
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(plain)]


@pytest.mark.devices(8)
def test_what_is_not_finite_changes_nothing_and_neither_does_what_comes_after() -> None:
    # Its state holds a key beside what is of the parameters' shapes.
    step = fragile_step(optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.adam(0.1)))
    assert step.guarded
    for bad in ({"scale": np.nan}, {"scale": np.inf}, {"edge": 0.0}):
        state, _ = step.update(step.init(jax.random.key(0)), fragile_batch())
        assert not state["stopped"]
        before = values(state)
        for batch, finite in ((fragile_batch(**bad), False), (fragile_batch(), True)):
            state, metrics = step.update(state, batch)
            assert np.isfinite(metrics["loss"] + metrics["grad_norm"]) == finite
            assert state["stopped"]
            for got, wanted in zip(values(state), before, strict=True):
                np.testing.assert_array_equal(got, wanted)


@pytest.mark.once("sharding/transform/test_step.py")
@pytest.mark.devices(8)
def test_an_optimizer_that_deals_with_nan_is_left_to_do_so() -> None:
    made = optax.apply_if_finite(optax.sgd(0.1), 5)
    step = fragile_step(made)
    assert not step.guarded
    state, _ = step.update(step.init(jax.random.key(0)), fragile_batch(scale=float("nan")))
    assert (int(state["step"]), int(state["optimizer"].notfinite_count)) == (1, 1)
    again, _ = step.update(state, fragile_batch())
    wanted, _ = fragile_step(optax.sgd(0.1)).update(
        fragile_step(optax.sgd(0.1)).init(jax.random.key(0)), fragile_batch()
    )
    assert (int(again["step"]), bool(again["stopped"])) == (2, False)
    np.testing.assert_allclose(again["params"]["w"], wanted["params"]["w"], rtol=1e-6)


@pytest.mark.once("sharding/transform/test_step.py")
@pytest.mark.devices(8)
def test_the_guard_can_be_taken_away_and_a_state_without_the_flag_is_sound() -> None:
    step = fragile_step(optax.sgd(0.1), guard=False)
    state, _ = step.update(step.init(jax.random.key(0)), fragile_batch(scale=float("nan")))
    assert np.isnan(np.asarray(state["params"]["w"])).all()
    step = fragile_step(optax.sgd(0.1))
    state, _ = step.update(lasting(step.init(jax.random.key(0))), fragile_batch())
    assert (int(state["step"]), bool(state["stopped"])) == (1, False)


@pytest.mark.once("sharding/transform/test_step.py")
@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["step", "params", "optimizer", "stopped"])
def test_a_parameter_may_be_named_as_a_part_of_the_state(name: str) -> None:
    def init(key: Any) -> Any:
        return {name: draws.normal(key, (8, 16)), "out": draws.normal(key, (16, 8))}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ params[name] @ params["out"]) ** 2)

    batch = {"x": fragile_batch()["x"]}
    shapes = jax.eval_shape(init, jax.random.key(0))
    names = {name: ("embed", "mlp"), "out": ("mlp", "embed")}
    plan = declare(loss, shapes, batch, topology="cpu:8", mesh={"fsdp": 8}, names=names)
    state = plan.init(init, jax.random.key(0), optax.adam(0.1))
    state, metrics = plan.train_step(loss, optax.adam(0.1))(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss(init(jax.random.key(0)), batch), rtol=1e-5)
    for tree in (state["params"], state["optimizer"][0].mu):
        for leaf in jax.tree.leaves(tree):
            assert leaf.addressable_data(0).size == leaf.size // 8


@pytest.mark.devices(8)
def test_an_optimizer_whose_numbers_insist_on_no_type_is_compiled_once() -> None:
    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda g: -1e-2 * g, gradients), {"seen": state["seen"] + jnp.float32(1)}

    step = sharded_step(
        {"data": 8}, optax.GradientTransformation(lambda _: {"seen": jnp.asarray(0.0)}, update)
    )
    state = step.init(jax.random.key(7))
    for batch in batches()[:2]:
        state, _ = step.update(state, batch)
    assert step.update._cache_size() == 1
    assert state["optimizer"]["seen"] == 2
