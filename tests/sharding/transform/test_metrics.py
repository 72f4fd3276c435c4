"""Metrics of a step: whatever a loss gives beside its scalar, and the norm of gradients of any type."""

from __future__ import annotations

from typing import Any, NamedTuple

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import declare, train_step
from meshwright.sharding.transform.metrics import LOGGED

pytestmark = pytest.mark.numerics

ROWS, WIDTH = 16, 8
SGD = optax.sgd(0.1)


class Counts(NamedTuple):
    rows: Any
    largest: Any


def init(key: Any) -> Any:
    return {"w": draws.normal(key, (WIDTH, WIDTH)) / 3}


def batch() -> Any:
    return {"x": draws.normal(jax.random.key(1), (ROWS, WIDTH))}


def one_step(loss: Any, init: Any = init, optimizer: Any = None, **how: Any) -> tuple[Any, Any, Any]:
    """Return the step's metrics, what evaluation gives, and the next parameters."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    rules = {"*w": [None, "fsdp"]}
    plan = declare(loss, shapes, batch(), topology="cpu:8", mesh={"fsdp": 8}, rules=rules, **how)
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    step = train_step(plan, loss, init, batch(), optimizer, mesh=plan.make_mesh())
    state = step.init(jax.random.key(0))
    placed = jax.device_put(batch(), step.batch)
    value = jax.device_get(step.evaluate(state["params"], placed))
    state, metrics = step.update(state, placed)
    for leaf in metrics.values():
        # What is logged can be read by every process.
        assert leaf.size > LOGGED or leaf.is_fully_replicated
    return jax.device_get(metrics), value, jax.device_get(state["params"])


def outputs(params: Any, batch: Any) -> Any:
    return jnp.tanh(batch["x"] @ params["w"])


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("aux", "wanted"),
    [
        (
            lambda y: {"loss": y.max(), "grad_norm": y.min(), "hits": y.sum()},
            lambda y: {"aux/loss": y.max(), "aux/grad_norm": y.min(), "hits": y.sum()},
        ),
        (
            lambda y: (y.max(), {"deep": y.min()}, None),
            lambda y: {"aux/0": y.max(), "aux/1/deep": y.min()},
        ),
        (lambda y: y.max(), lambda y: {"aux": y.max()}),
        (
            lambda y: Counts(rows=y.shape[0], largest={"of": y.max()}),
            lambda y: {"rows": ROWS, "largest/of": y.max()},
        ),
        (
            lambda y: {"loss": y.max(), "aux": {"loss": y.min()}},
            lambda y: {"aux/loss": y.min(), "aux/aux/loss": y.max()},
        ),
        (
            lambda y: {"each": y, "odd": (y > 0).sum(1)},
            lambda y: {"each": y, "odd": (y > 0).sum(1)},
        ),
    ],
)
def test_whatever_a_loss_gives_is_among_the_metrics(aux: Any, wanted: Any) -> None:
    def loss(params: Any, batch: Any) -> Any:
        found = outputs(params, batch)
        return jnp.mean(found**2), aux(found)

    found = outputs(init(jax.random.key(0)), batch())
    metrics, (value, evaluated), _ = one_step(loss)
    expected = {"loss": jnp.mean(found**2), **wanted(found)}
    assert set(metrics) == {"grad_norm", *expected}
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-6)
    for name, leaf in expected.items():
        np.testing.assert_allclose(metrics[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)
    assert jax.tree.structure(evaluated) == jax.tree.structure(aux(found))
    for got, leaf in zip(jax.tree.leaves(evaluated), jax.tree.leaves(aux(found)), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.devices(8)
def test_two_parts_give_the_metrics_of_the_whole() -> None:
    def loss(params: Any, batch: Any) -> Any:
        found = outputs(params, batch)
        return jnp.mean(found**2), (
            found.max(),
            {"each": found, "odd": (found > 0).sum(1)},
            {"loss": found.sum()},
        )

    one, (_, whole), _ = one_step(loss)
    two, (_, evaluated), _ = one_step(loss, microbatches=2)
    assert set(one) == set(two) == {"loss", "grad_norm", "aux/0", "aux/1/each", "aux/1/odd", "aux/2/loss"}
    for got, wanted in zip(jax.tree.leaves((two, evaluated)), jax.tree.leaves((one, whole)), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("dtype", "made"),
    [
        ("complex64", SGD),
        ("complex64", optax.adam(1e-2)),
        ("bfloat16", optax.adam(1e-2)),
        ("float16", SGD),
    ],
)
def test_parameters_of_any_float_type_are_trained_as_in_plain_jax(dtype: str, made: Any) -> None:
    def init(key: Any) -> Any:
        w, v, turn = draws.normal(key, (3, WIDTH, WIDTH)) / 3
        w = w + 1j * turn if dtype == "complex64" else w
        return {"w": w.astype(dtype), "v": v}

    def loss(params: Any, batch: Any) -> Any:
        found = batch["x"].astype(dtype) @ params["w"]
        return jnp.mean(jnp.abs(found @ params["v"].astype(dtype) - 1).astype(jnp.float32) ** 2)

    params = init(jax.random.key(0))
    gradients = jax.jit(jax.grad(loss))(params, batch())
    changes, _ = made.update(gradients, made.init(params), params)
    after = optax.apply_updates(params, changes)
    metrics, _, found = one_step(loss, init, made, microbatches=2 if made is SGD else 1)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype("complex128"), gradients)
    length = np.sqrt(sum(np.sum(np.abs(leaf) ** 2) for leaf in jax.tree.leaves(wide)))
    rounding = 1e-5 if dtype == "complex64" else float(jnp.finfo(dtype).eps)
    assert metrics["grad_norm"].dtype == np.float32
    np.testing.assert_allclose(metrics["grad_norm"], length, rtol=2 * rounding)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(after), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(
            got.astype("complex64"), np.asarray(wanted).astype("complex64"), atol=4 * rounding
        )


@pytest.mark.devices(8)
def test_the_norm_of_gradients_in_half_precision_is_beyond_their_type() -> None:
    def init(key: Any) -> Any:
        del key
        return {"w": jnp.ones((WIDTH, WIDTH), jnp.float16)}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.sum(params["w"].astype(jnp.float32)) * 2.0e4 + 0 * jnp.sum(batch["x"])

    metrics, _, _ = one_step(loss, init)
    np.testing.assert_allclose(metrics["grad_norm"], 2.0e4 * WIDTH, rtol=1e-3)
