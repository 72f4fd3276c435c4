"""Losses and arguments as users write them: what is right is run, what is wrong is one sentence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import UserError, declare, plan, train_step
from meshwright.sharding.transform.step import Step

WIDTH, CLASSES, ROWS = 16, 8, 16
NAMES = {"table": ("embed", "mlp"), "head": ("mlp", None), "gain": (None,), "heat": ()}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def init(key: Any) -> dict[str, Any]:
    one, two = jax.random.split(key)
    return {
        "table": draws.normal(one, (WIDTH, WIDTH)) / 4,
        "head": draws.normal(two, (WIDTH, CLASSES)) / 4,
        "gain": jnp.full((WIDTH,), 0.1),
        "heat": 1.0,
    }


SHAPES = jax.eval_shape(init, jax.random.key(0))


def batch_of(rows: int = ROWS) -> dict[str, Any]:
    return {
        "x": np.linspace(-1, 1, rows * WIDTH, dtype=np.float32).reshape(rows, WIDTH),
        "label": np.arange(rows) % CLASSES,
        "ids": np.arange(rows),
        "key": jax.random.key(3),
        "old key": jax.random.PRNGKey(4),
        "class weights": np.linspace(1, 2, CLASSES, dtype=np.float32),
        "mask": np.tri(WIDTH, dtype=np.float32),
        "step": np.int32(2),
        "nothing": None,
    }


def loss(params: Any, batch: Any) -> Any:
    noise = (jax.random.key_data(batch["key"]) + batch["old key"]).sum() % 7 + batch["step"]
    hidden = (batch["x"] @ batch["mask"] + noise) @ params["table"] * params["gain"]
    logits = jax.nn.log_softmax(hidden @ params["head"] * params["heat"])
    picked = jnp.take_along_axis(logits, batch["label"][:, None], 1)[:, 0]
    # Nothing reads the ids.
    return -(picked * batch["class weights"][batch["label"]]).mean()


@pytest.fixture(scope="module")
def step() -> Step:
    made = declare(loss, SHAPES, batch_of(), topology="cpu:8", mesh=MESH, names=NAMES)
    return train_step(made, loss, init, batch_of(), optax.adam(1e-2), mesh=made.make_mesh())


@pytest.mark.devices(8)
@pytest.mark.numerics
def test_keys_weights_masks_and_numbers_come_with_the_rows(step: Step) -> None:
    params = jax.tree.map(jnp.asarray, init(jax.random.key(0)))
    optimizer = optax.adam(1e-2)
    moments, state = optimizer.init(params), step.init(jax.random.key(0))
    plainly = jax.jit(jax.value_and_grad(loss))

    @jax.jit
    def updated(params: Any, moments: Any, gradients: Any) -> Any:
        changes, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, changes), moments

    for _ in range(2):
        value, gradients = plainly(params, batch_of())
        params, moments = updated(params, moments, gradients)
        state, metrics = step.update(state, batch_of())
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state["params"], params)
    # Weak types of the first state do not outlast it: one program for all steps.
    assert step.update._cache_size() == 1
    with_rows = {path for path, sharding in step.batch.items() if path != "nothing" and any(sharding.spec)}
    assert with_rows == {"x", "label", "ids"}
    half, _ = step.evaluate(state["params"], batch_of(ROWS // 2))
    np.testing.assert_allclose(half, jax.jit(loss)(params, batch_of(ROWS // 2)), rtol=1e-4)


@pytest.mark.devices(8)
@pytest.mark.parametrize("door", ["update", "evaluate"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": np.ones((ROWS, WIDTH + 1), np.float32)}, "'x' has shape"),
        ({"x": np.ones((ROWS, WIDTH), np.int32)}, "'x' is of type int32; the plan was made for float32"),
        ({"more": np.ones(ROWS)}, "has a batch array 'more' that the plan lacks"),
        ({"label": None}, "has a batch array 'label' that the program lacks"),
    ],
)
def test_another_batch_is_one_sentence(step: Step, door: str, change: dict[str, Any], said: str) -> None:
    state = step.abstract_state
    call = {"update": step.update.lower, "evaluate": step.evaluate.lower}[door]
    with pytest.raises(UserError, match=said):
        call(state if door == "update" else state["params"], {**batch_of(), **change})


@pytest.mark.devices(8)
def test_rows_that_do_not_divide_are_one_sentence(step: Step) -> None:
    with pytest.raises(UserError, match="14 rows does not divide by data=2 x fsdp=2; nearest: 12 or 16"):
        step.evaluate.lower(step.abstract_state["params"], batch_of(14))
    with pytest.raises(UserError, match="'label' has 12 rows and 'ids' has 16"):
        step.evaluate.lower(step.abstract_state["params"], {**batch_of(), "label": np.arange(12) % CLASSES})


def of(result: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda params, x: result((x @ params["w"]) ** 2)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda _: None, "gives None; does it lack a return"),
        (lambda h: h.mean(1), r"gives an array of shape \(16,\): return its mean or sum"),
        (lambda h: "no", "gives the text 'no'"),
        (lambda h: (h.mean(), {}, {}), "gives a tuple of 3"),
        (lambda h: [h.mean(), {}], "gives of type list|gives .*list"),
        (lambda h: {"loss": h.mean()}, "gives .*dict"),
        (lambda h: (h.mean(), {"how": "fast"}), "aux value 'how' is the text 'fast'"),
        (lambda h: h.argmax(), "gives a scalar of type int32, which has no gradient"),
    ],
)
def test_a_malformed_result_is_one_sentence(result: Callable[[Any], Any], said: str) -> None:
    params = {"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32")}
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), "float32")
    one = of(result)
    with pytest.raises(UserError, match=said):
        plan(one, params, x, topology="cpu:8")
    with pytest.raises(UserError, match=said):
        declare(one, params, x, topology="cpu:8", mesh={"data": 8})
    good = declare(of(jnp.mean), params, x, topology="cpu:8", mesh={"data": 8})
    with pytest.raises(UserError, match=said):
        good.check(params, x, one)
    with pytest.raises(UserError, match=said):
        jax.eval_shape(good.apply(one, jax.sharding.AbstractMesh((8,), ("data",))), params, x)


@pytest.mark.parametrize("leaf", [jax.nn.gelu, "gelu", object(), np.array(["a"])])
def test_what_is_no_array_is_one_sentence(leaf: Any) -> None:
    params = {"w": jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32")}
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), "float32")
    with pytest.raises(UserError, match=r"parameter 'act' is .* neither an array nor a number"):
        plan(of(jnp.mean), {**params, "act": leaf}, x, topology="cpu:8")
    with pytest.raises(UserError, match=r"batch array 'act' is .* neither an array nor a number"):
        declare(
            lambda p, b: of(jnp.mean)(p, b["x"]),
            params,
            {"x": x, "act": leaf},
            topology="cpu:8",
            mesh={"data": 8},
        )
