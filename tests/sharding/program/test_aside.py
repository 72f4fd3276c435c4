"""What changes beside the parameters: as in plain training, in parts, kept, and read alone by evaluation."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from meshwright.runtime.checkpoint import Checkpoints
from meshwright.sharding import Plan, UserError, declare, plan, train_step
from meshwright.sharding.report.plan import plan_document
from meshwright.sharding.report.terminal import plain_text
from meshwright.sharding.transform.step import lasting, resumed

pytestmark = pytest.mark.numerics

ROWS, WIDTH, HIDDEN, STEPS = 16, 32, 64, 4
NAMES = {"up": ("embed", "mlp"), "scale": ("mlp",), "down": ("mlp", "embed")}
MESHES: dict[str, dict[str, Any]] = {
    "three axes": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "names": NAMES},
    "fsdp": {"mesh": {"fsdp": 8}, "names": NAMES},
    "searched": {},
}
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "momentum": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1e-1, momentum=0.9)),
    "factored": optax.adafactor(1e-2, min_dim_size_to_factor=2),
}
ADAM = OPTIMIZERS["adamw"]


def init(key: Any) -> tuple[Any, Any]:
    one, two = jax.random.split(key)
    params = {
        "up": draws.normal(one, (WIDTH, HIDDEN)) / 6,
        "scale": jnp.ones(HIDDEN),
        "down": draws.normal(two, (HIDDEN, WIDTH)) / 8,
    }
    state = {
        "statistics": {"mean": jnp.zeros(HIDDEN), "variance": jnp.ones(HIDDEN)},
        "average": jax.tree.map(lambda leaf: leaf * 0.5, params),
        "draws": jax.random.key(11),
        "count": jnp.uint32(0),
        "fixed": jnp.ones((3,), jnp.int8),
    }
    return params, state


def loss(params: Any, batch: Any, state: Any) -> Any:
    """A layer with batch statistics, dropout, a counter, and a moving average of all parameters."""
    draws, now = jax.random.split(state["draws"])
    hidden = batch["x"] @ params["up"]
    mean, variance = hidden.mean(0), hidden.var(0)
    hidden = (hidden - mean) * jax.lax.rsqrt(variance + 1e-3) * params["scale"]
    kept = jax.random.bernoulli(now, 0.9, hidden.shape)
    value = jnp.square((jax.nn.gelu(hidden) * kept) @ params["down"] - batch["y"]).mean()
    seen = {"mean": mean, "variance": variance}
    new = {
        "statistics": jax.tree.map(lambda old, one: 0.9 * old + 0.1 * one, state["statistics"], seen),
        "average": jax.tree.map(lambda old, one: 0.99 * old + 0.01 * one, state["average"], params),
        "draws": draws,
        "count": state["count"] + 1,
        "fixed": state["fixed"],
    }
    return value, ({"spread": variance.mean()}, new)


def batches() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {name: random.standard_normal((ROWS, WIDTH), np.float32) for name in ("x", "y")} for _ in range(STEPS)
    ]


PARAMS, STATE = jax.eval_shape(init, jax.random.key(0))


def planned(optimizer: Any = ADAM, **how: Any) -> Plan:
    made = declare if "mesh" in how else plan
    given = {"topology": "cpu:8", "optimizer": optimizer, "state": STATE} | how
    return made(given.pop("loss", loss), PARAMS, batches()[0], **given)


def plainly(loss: Any, init: Any, optimizer: Any) -> dict[str, Any]:
    """Losses, parameters, moments and state by the loop that everybody writes, on one device."""

    @jax.jit
    def update(params: Any, moments: Any, state: Any, batch: Any) -> Any:
        (value, (_, state)), gradients = jax.value_and_grad(jax.jit(loss), has_aux=True)(params, batch, state)
        changes, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, changes), moments, state, value

    params, state = jax.jit(init)(jax.random.key(0))
    moments, losses = optimizer.init(params), []
    for batch in batches():
        params, moments, state, value = update(params, moments, state, batch)
        losses.append(float(value))
    return {"losses": losses, "params": params, "optimizer": moments, "state": state}


def raw(leaf: Any) -> Any:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_close(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(raw(one), raw(other), rtol=5e-4, atol=5e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        ("factored", "searched"),
        pytest.param("adamw", "three axes", marks=pytest.mark.slow),
        pytest.param("momentum", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_it_changes_as_in_plain_training(optimizer: str, how: str) -> None:
    made = OPTIMIZERS[optimizer]
    found = planned(made, **MESHES[how])
    step = train_step(found, loss, init, batches()[0], made, mesh=found.make_mesh())
    state, losses = step.init(jax.random.key(0)), []
    for batch in batches():
        state, metrics = step.update(state, jax.device_put(batch, step.batch))
        losses.append(float(metrics["loss"]))
        assert "spread" in metrics
    wanted = plainly(loss, init, made)
    np.testing.assert_allclose(losses, wanted["losses"], rtol=1e-4)
    for name in ("params", "state", "optimizer"):
        assert_close(state[name], wanted[name])
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(step.abstract_state), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


@pytest.mark.once("sharding/program/test_aside.py")
@pytest.mark.devices(8)
def test_a_moving_average_lies_as_its_parameters_and_is_never_gathered() -> None:
    found = planned(**MESHES["fsdp"])
    assert found.state is not None
    for name in PARAMS:
        assert found.state[f"average/{name}"].spec == found.params[name].spec
    without = {key: leaf for key, leaf in STATE.items() if key != "average"}

    def plain(params: Any, batch: Any, state: Any) -> Any:
        value, (aux, new) = loss(params, batch, {**state, "average": params})
        return value, (aux, {key: new[key] for key in state})

    def gathers(loss: Any, state: Any) -> int:
        made = planned(**MESHES["fsdp"], loss=loss, state=state)
        start = lambda key: (init(key)[0], {name: init(key)[1][name] for name in state})
        step = train_step(made, loss, start, batches()[0], ADAM, mesh=made.make_mesh())
        placed = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            batches()[0],
            step.batch,
        )
        text = step.update.lower(step.abstract_state, placed).compile().as_text()
        return text.count(" all-gather(")

    # Jitted, as a config's model is, the whole loss is one call.
    assert gathers(jax.jit(loss), STATE) == gathers(plain, without)


@pytest.mark.once("sharding/program/test_aside.py")
@pytest.mark.devices(8)
def test_a_run_goes_on_from_a_checkpoint_on_another_mesh(tmp_path: pathlib.Path) -> None:
    one, other = planned(**MESHES["three axes"]), planned(**MESHES["fsdp"])
    steps = [train_step(p, loss, init, batches()[0], ADAM, mesh=p.make_mesh()) for p in (one, other)]
    state = steps[0].init(jax.random.key(0))
    with Checkpoints(tmp_path) as checkpoints:
        for number, batch in enumerate(batches()[:2]):
            state, _ = steps[0].update(state, jax.device_put(batch, steps[0].batch))
            checkpoints.save(number, lasting(state), metadata={})
        restored = checkpoints.restore(lasting(steps[1].abstract_state))
    assert restored is not None
    state = resumed(restored.state, steps[1].abstract_state)
    for batch in batches()[2:]:
        state, _ = steps[1].update(state, jax.device_put(batch, steps[1].batch))
    wanted = plainly(loss, init, ADAM)
    for name in ("params", "state", "optimizer"):
        assert_close(state[name], wanted[name])


@pytest.mark.once("sharding/program/test_aside.py")
@pytest.mark.devices(8)
def test_evaluation_and_apply_read_it_and_leave_it() -> None:
    found = planned(**MESHES["three axes"])
    step = train_step(found, loss, init, batches()[0], ADAM, mesh=found.make_mesh())
    state = step.init(jax.random.key(0))
    before = jax.tree.map(raw, state["state"])
    value, aux = step.evaluate(state["params"], batches()[0], state["state"])
    wanted, (wanted_aux, new) = jax.jit(loss)(
        *init(jax.random.key(0))[:1], batches()[0], init(jax.random.key(0))[1]
    )
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    assert float(aux["spread"]) == pytest.approx(float(wanted_aux["spread"]), rel=1e-5)
    applied, (_, changed) = jax.jit(found.apply(loss))(state["params"], batches()[0], state["state"])
    assert float(applied) == pytest.approx(float(wanted), rel=1e-5)
    assert_close(changed, new)
    for old, now in zip(jax.tree.leaves(before), jax.tree.leaves(state["state"]), strict=True):
        np.testing.assert_array_equal(old, raw(now))


@pytest.mark.once("sharding/transform/test_step.py")
@pytest.mark.devices(8)
def test_a_step_that_is_not_finite_leaves_it_as_it_was() -> None:
    found = planned(**MESHES["three axes"])
    step = train_step(found, loss, init, batches()[0], ADAM, mesh=found.make_mesh())
    state = step.init(jax.random.key(0))
    before = jax.tree.map(raw, state["state"])
    bad = {**batches()[0], "y": np.full((ROWS, WIDTH), np.nan, np.float32)}
    state, _ = step.update(state, jax.device_put(bad, step.batch))
    assert bool(state["stopped"])
    for old, now in zip(jax.tree.leaves(before), jax.tree.leaves(state["state"]), strict=True):
        np.testing.assert_array_equal(old, raw(now))


class Net(nnx.Module):
    """A model of Flax NNX that changes as it runs: batch statistics and dropout's random state."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.dropout(nnx.gelu(self.norm(self.up(x)))))


def nnx_init(key: Any) -> tuple[Any, Any]:
    _, params, rest = nnx.split(Net(nnx.Rngs(key)), nnx.Param, ...)
    return params, rest


def nnx_loss(params: Any, batch: Any, rest: Any) -> Any:
    graph = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    net = nnx.merge(graph, params, rest)
    value = jnp.square(net(batch["x"]) - batch["y"]).mean()
    return value, ({}, nnx.state(net, nnx.Not(nnx.Param)))


@pytest.mark.devices(8)
def test_an_nnx_model_with_batch_statistics_and_dropout() -> None:
    params, rest = jax.eval_shape(nnx_init, jax.random.key(0))
    made = OPTIMIZERS["momentum"]
    found = plan(nnx_loss, params, batches()[0], topology="cpu:8", optimizer=made, state=rest)
    state = found.init(nnx_init, jax.random.key(0))
    update = found.train_step(nnx_loss, made)
    for batch in batches():
        state, _ = update(state, batch)
    wanted = plainly(nnx_loss, nnx_init, made)
    for name in ("params", "state", "optimizer"):
        assert_close(state[name], wanted[name])


def test_the_plan_prices_keeps_and_says_it() -> None:
    found = planned(**MESHES["three axes"])
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))).decision() == found.decision()
    assert found.estimate is not None
    assert found.estimate.memory["state"] == found.bytes_per_device("state")
    assert "average/up" in plain_text(plan_document(found))
    assert "given anew by each step" in found.explain("statistics/mean")
    assert "state" in found.compare(planned(**MESHES["fsdp"])).to_dict()["differs"]
    without = planned(
        **MESHES["three axes"], state=None, loss=lambda p, b: loss(p, b, init(jax.random.key(0))[1])[0]
    )
    assert "state" not in without.to_dict()


def test_a_moving_average_costs_its_room_and_one_pass_over_it() -> None:
    """It gathers nothing, and no value of it is an activation."""

    def priced(state: Any) -> Any:
        def averaging(params: Any, batch: Any, state: Any) -> Any:
            value = jnp.square(jnp.tanh(batch["x"] @ params["up"] * params["scale"]) @ params["down"]).mean()
            return value, (
                {},
                jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state, params) if state else {},
            )

        shapes = {
            name: jax.ShapeDtypeStruct(tuple(32 * n for n in leaf.shape), "float32")
            for name, leaf in PARAMS.items()
        }
        batch = {"x": jax.ShapeDtypeStruct((512, 32 * WIDTH), "float32")}
        made = declare(
            averaging,
            shapes,
            batch,
            topology="v5e:2x4",
            mesh={"fsdp": 8},
            names=NAMES,
            state=state and shapes,
        )
        assert made.estimate is not None
        return made.estimate

    without, kept = priced({}), priced(PARAMS)
    assert kept.memory.pop("state") == pytest.approx(kept.memory["params"])
    assert kept.memory == without.memory
    differing = {item for item in kept.time if kept.time[item] != without.time[item]}
    assert differing <= {"optimizer", "stragglers"}
    assert kept.time["optimizer"] < 2 * without.time["optimizer"]


def test_a_large_one_that_is_like_no_parameter_is_cut_by_itself() -> None:
    table = jax.ShapeDtypeStruct((128, 96), "float32")

    def remembering(params: Any, batch: Any, state: Any) -> Any:
        value, _ = loss(params, batch, init(jax.random.key(0))[1])
        return value, ({}, {"table": state["table"] + 1, "rows": state["rows"] * 0.5 + batch["x"]})

    rows = jax.ShapeDtypeStruct((ROWS, WIDTH), "float32")
    for how in ({"mesh": {"data": 2, "fsdp": 4}, "names": NAMES}, {"mesh": {"fsdp": 8}, "names": NAMES}):
        found = planned(**how, loss=remembering, state={"table": table, "rows": rows})
        assert found.state is not None
        assert "fsdp" in found.state["table"].spec
        assert found.state["rows"].spec == found.batch["x"].spec
    odd = planned(
        **MESHES["fsdp"],
        loss=lambda p, b, s: (loss(p, b, init(jax.random.key(0))[1])[0], ({}, s)),
        state={"odd": jax.ShapeDtypeStruct((129, 97), "float32")},
    )
    assert any("odd (129, 97) lies whole on every device" in note for note in odd.notes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v, aux, new: (v, aux), r"returns \(loss, \(aux, state\)\)"),
        (lambda v, aux, new: v, r"returns \(loss, \(aux, state\)\)|the new state lacks"),
        (lambda v, aux, new: (v, (aux, {**new, "count": new["count"] * 1.0})), "'count' as float32"),
        (lambda v, aux, new: (v, (aux, {**new, "more": v})), "has 'more', which the state lacks"),
        (
            lambda v, aux, new: (v, (aux, {k: x for k, x in new.items() if k != "draws"})),
            "lacks 'draws', which the state has",
        ),
    ],
)
def test_a_result_that_is_not_one_of_a_loss_with_a_state(change: Any, sentence: str) -> None:
    def wrong(params: Any, batch: Any, state: Any) -> Any:
        value, (aux, new) = loss(params, batch, state)
        return change(value, aux, new)

    with pytest.raises(UserError, match=sentence):
        planned(**MESHES["fsdp"], loss=wrong)


@pytest.mark.devices(8)
def test_doors_that_lack_it_or_have_too_much_are_one_sentence() -> None:
    found = planned(**MESHES["fsdp"])
    with pytest.raises(UserError, match=r"init\(key\) has to return \(params, state\)"):
        found.init(lambda key: init(key)[0], jax.random.key(0))
    with pytest.raises(UserError, match="with a state of 8 arrays; give the state too"):
        found.check(PARAMS, batches()[0])
    with pytest.raises(UserError, match="state array 'count' has shape"):
        found.check(PARAMS, batches()[0], state={**STATE, "count": jax.ShapeDtypeStruct((2,), "uint32")})
    with pytest.raises(UserError, match="the program has a state array 'more' that the plan lacks"):
        found.check(PARAMS, batches()[0], state={**STATE, "more": STATE["count"]})
    with pytest.raises(UserError, match="microbatches=2"):
        planned(**MESHES["fsdp"], microbatches=2)
