"""A planned loss: traced and analysed once, the same wherever it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import Plan, declare, train_step
from meshwright.sharding.program.jaxpr import Traces
from meshwright.sharding.transform import compose
from meshwright.sharding.transform.compose import PlannedLoss
from meshwright.sharding.verify.export import abstract_mesh

pytestmark = pytest.mark.numerics

ROWS, WIDTH, LAYERS = 16, 8, 2
NAMES = {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")}
OPTIMIZER = optax.sgd(0.1)


def plain(params: Any, batch: Any) -> Any:
    def layer(x: Any, weights: Any) -> Any:
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(layer, batch["x"], params)
    return jnp.square(x).mean(), {"largest": jnp.abs(x).mean()}


def init(key: Any) -> Any:
    up, down = jax.random.split(key)
    return {
        "up": draws.normal(up, (LAYERS, WIDTH, 2 * WIDTH)) / 4,
        "down": draws.normal(down, (LAYERS, 2 * WIDTH, WIDTH)) / 4,
    }


def batch() -> Any:
    return {"x": np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)}


class Counted:
    """A loss that counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, params: Any, batch: Any) -> Any:
        self.calls += 1
        return plain(params, batch)


def declared(loss: Any, mesh: dict[str, int] | None = None, **how: Any) -> Plan:
    params = jax.eval_shape(init, jax.random.key(0))
    mesh = {"fsdp": 4, "tensor": 2} if mesh is None else mesh
    return declare(loss, params, batch(), topology="cpu:8", mesh=mesh, names=NAMES, **how)


@pytest.fixture
def analyses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Jaxprs that were analysed since."""
    found: list[Any] = []
    read = compose.read

    def counting(jaxpr: Any, *others: Any, **named: Any) -> Any:
        found.append(jaxpr)
        return read(jaxpr, *others, **named)

    monkeypatch.setattr(compose, "read", counting)
    return found


@pytest.mark.devices(8)
@pytest.mark.parametrize(("microbatches", "programs"), [(1, 1), (4, 2)])
def test_a_step_is_traced_once_for_a_batch_shape_and_analysed_once(
    microbatches: int, programs: int, analyses: list[Any]
) -> None:
    """Under microbatches the program of a part, which is made of the whole batch's, is analysed too."""
    loss = Counted()
    plan = declared(loss, remat="full", microbatches=microbatches)
    loss.calls = 0
    step = train_step(plan, loss, init, batch(), OPTIMIZER, mesh=plan.make_mesh())
    state = step.init(jax.random.key(0))
    placed = jax.device_put(batch(), step.batch)
    step.update.lower(step.abstract_state, batch())
    step.evaluate(state["params"], placed)
    step.update(state, placed)
    assert (loss.calls, len(analyses)) == (1, programs)


@pytest.mark.devices(8)
def test_a_plans_own_step_is_traced_once_and_analysed_once(analyses: list[Any]) -> None:
    loss = Counted()
    plan = declared(loss, remat={"up": "device"})
    loss.calls = 0
    state = plan.init(init, jax.random.key(0), OPTIMIZER)
    step = plan.train_step(loss, OPTIMIZER)
    for _ in range(2):
        state, _ = step(state, batch())
    assert (loss.calls, len(analyses)) == (1, 1)


@pytest.mark.devices(8)
def test_both_steps_are_one() -> None:
    plan = declared(plain, microbatches=2)
    whole = train_step(plan, plain, init, batch(), OPTIMIZER, mesh=plan.make_mesh())
    results = []
    for update in (whole.update, plan.train_step(plain, OPTIMIZER)):
        results.append(update(whole.init(jax.random.key(1)), jax.device_put(batch(), whole.batch)))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.once("sharding/transform/test_compose.py")
@pytest.mark.devices(8)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_evaluation_is_constrained_as_training_is(microbatches: int) -> None:
    plan = declared(plain, microbatches=microbatches)
    step = train_step(plan, plain, init, batch(), OPTIMIZER, mesh=plan.make_mesh())
    params = step.init(jax.random.key(0))["params"]
    placed = jax.device_put(batch(), step.batch)
    program = str(jax.make_jaxpr(step.evaluate)(params, placed))
    assert "sharding_constraint" in program
    assert "sharding_constraint" not in str(jax.make_jaxpr(plain)(params, placed))
    value, aux = step.evaluate(params, placed)
    expected, wanted = plain(jax.device_get(params), batch())
    np.testing.assert_allclose(float(value), float(expected), rtol=1e-6)
    np.testing.assert_allclose(float(aux["largest"]), float(wanted["largest"]), rtol=1e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_values_come_with_gradients(microbatches: int) -> None:
    plan = declared(plain, microbatches=microbatches)
    planned = PlannedLoss(plan, plain, plan.make_mesh())
    params = init(jax.random.key(0))
    (expected, aux), wanted = jax.jit(jax.value_and_grad(plain, has_aux=True))(params, batch())
    (value, found), gradients = jax.jit(planned.value_and_grad)(params, batch())
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(found["largest"], aux["largest"], rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.devices(8)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_loss_may_read_what_is_traced_around_it(microbatches: int) -> None:
    plan = declared(lambda params, batch: plain(params, batch)[0], microbatches=microbatches)
    params = init(jax.random.key(0))

    def times(scale: Any) -> Any:
        return plan.apply(lambda params, batch: scale * plain(params, batch)[0])(params, batch())

    once, thrice = (jax.jit(times)(jnp.float32(scale)) for scale in (1, 3))
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def traced(function: Callable[..., Any], *args: Any) -> str:
    return str(Traces(function).on(*args).jaxpr)


def test_traces_are_told_by_types_shapes_and_settings() -> None:
    calls = []

    def function(x: Any, y: Any) -> Any:
        calls.append(x)
        return x @ x + y

    traces = Traces(function)
    x = np.ones((2, 2), np.float32)
    first = traces.on(x, 1.0)
    assert traces.on(jnp.zeros((2, 2)), 2.0) is first
    assert jax.jit(lambda x: traces.on(x, 3.0) is first and x)(x) is not None
    assert len(calls) == 1
    assert traces.on(x.astype(np.float16), 1.0).result.dtype == np.float16
    with jax.default_matmul_precision("float32"):
        assert traces.on(x, 1.0) is not first
    assert len(calls) == 3


def test_a_number_of_pythons_own_insists_on_no_type() -> None:
    half = jnp.ones(2, jnp.bfloat16)
    assert Traces(lambda x, y: x * y).on(half, 2.0).result.dtype == jnp.bfloat16
    assert Traces(lambda x, y: x * y).on(half, np.float32(2.0)).result.dtype == jnp.float32


@pytest.mark.parametrize(("topology", "casts"), [("v5e:4x4", True), ("h100:2x8", False)])
def test_sums_are_cast_for_a_compiler_that_reduces_them_as_cast(topology: str, casts: bool) -> None:
    """A weight that a loop reads in bfloat16: its gradient is reduced in it, or in float32."""

    def chunked(params: Any, batch: Any) -> Any:
        def chunk(total: Any, x: Any) -> Any:
            low = x.astype(jnp.bfloat16) @ params["out"].astype(jnp.bfloat16)
            return total + jnp.square(low.astype(jnp.float32)).sum(), None

        return jax.lax.scan(chunk, 0.0, jnp.moveaxis(batch["x"].reshape(ROWS, 4, 64), 1, 0))[0] / ROWS

    params = {"out": jax.ShapeDtypeStruct((64, 64), "float32")}
    data = {"x": jax.ShapeDtypeStruct((ROWS, 256), "float32")}
    plan = declare(chunked, params, data, topology=topology, mesh={"fsdp": 16})
    planned = PlannedLoss(plan, chunked, abstract_mesh(plan))
    program = jax.make_jaxpr(planned.value_and_grad)(params, data).jaxpr
    lowered = [eqn for eqn in program.eqns if eqn.params.get("new_dtype") == jnp.bfloat16]
    # The weight on its way to the loop, and its gradient on the way back.
    assert len(lowered) == 1 + casts


def attending(params: Any, batch: Any) -> Any:
    """Written for those who let no ranks and types meet by themselves."""
    heads = batch["x"].reshape(ROWS, 2, 4, 1)
    query, key = (heads * params[name].reshape(1, 1, 4, 1) for name in ("query", "key"))
    x = jax.nn.dot_product_attention(query, key, heads, is_causal=True).reshape(ROWS, WIDTH)
    logits = x @ params["out"]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return jnp.sum(each * batch["counts"]) / jnp.sum(batch["counts"])


@pytest.mark.devices(8)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_what_a_plan_adds_is_not_held_to_the_users_settings(microbatches: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "query": draws.normal(keys[0], (4,)),
        "key": draws.normal(keys[1], (4,)),
        "out": draws.normal(keys[2], (WIDTH, 12)),
    }
    data = {**batch(), "y": jnp.arange(ROWS) % 12, "counts": (jnp.arange(ROWS) % 3).astype(jnp.float32)}
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        want = jax.jit(jax.value_and_grad(attending))(params, data)
        made = declare(attending, params, data, topology="cpu:8", mesh={"data": 8}, microbatches=microbatches)
        got = jax.jit(jax.value_and_grad(made.apply(attending)))(params, data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
