"""What is not trained: kept as it is, in parts, without gradient, moments or their costs."""

from __future__ import annotations

import json
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.sharding import Plan, UserError, declare, plan, train_step
from meshwright.sharding.report.plan import plan_document
from meshwright.sharding.report.terminal import plain_text

pytestmark = pytest.mark.numerics

ROWS, WIDTH, RANK, STEPS = 16, 32, 4, 3
NAMES = {
    "base": ("embed", "mlp"),
    "quantised": ("embed", "mlp"),
    "noise": (),
    "turns": (),
    "lora": {"a": ("embed", None), "b": (None, "mlp")},
}
ADAM = optax.adamw(1e-2)
# Optimizers whose state is not two moments of each parameter, or which read the parameters as a whole.
OPTIMIZERS = {
    "adamw": ADAM,
    "clipped momentum": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1e-1, momentum=0.9)),
    "factored": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "labelled": optax.partition(
        {"a": optax.lion(1e-3), "b": optax.adam(1e-2), "none": optax.set_to_zero()},
        {**dict.fromkeys(("base", "quantised", "noise", "turns"), "none"), "lora": {"a": "a", "b": "b"}},
    ),
}
MESHES: dict[str, dict[str, Any]] = {
    "three axes": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "names": NAMES},
    "two parts": {"mesh": {"fsdp": 8}, "names": NAMES, "microbatches": 2},
}


def init(key: Any) -> dict[str, Any]:
    one, two, three = jax.random.split(key, 3)
    return {
        "base": draws.normal(one, (WIDTH, WIDTH)) / 6,
        "quantised": jax.random.randint(two, (WIDTH, WIDTH), -40, 40, "int8"),
        "noise": jax.random.key(5),
        "turns": jnp.uint32(2),
        "lora": {"a": draws.normal(three, (WIDTH, RANK)) / 6, "b": jnp.zeros((RANK, WIDTH))},
    }


def loss(params: Any, batch: Any) -> Any:
    table = params["base"] + params["quantised"].astype(jnp.float32) / 500
    noise = jax.random.normal(params["noise"], (WIDTH,)) / 100
    hidden = batch["x"] @ table + batch["x"] @ params["lora"]["a"] @ params["lora"]["b"]
    return jnp.square(jnp.tanh(hidden + noise * params["turns"]) - batch["y"]).mean()


def batches() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {name: random.standard_normal((ROWS, WIDTH), np.float32) for name in ("x", "y")} for _ in range(STEPS)
    ]


SHAPES = jax.eval_shape(init, jax.random.key(0))


def planned(optimizer: Any = ADAM, **how: Any) -> Plan:
    made = declare if "mesh" in how else plan
    given = {"topology": "cpu:8", "optimizer": optimizer, "trainable": "lora/*"} | how
    return made(loss, SHAPES, batches()[0], **given)


def plainly(optimizer: Any) -> tuple[list[float], Any, Any]:
    """Losses, adapters and the optimizer's arrays by the loop that everybody writes, on one device."""
    params = init(jax.random.key(0))
    frozen = dict.fromkeys(("base", "quantised", "noise", "turns"))

    @jax.jit
    def update(lora: Any, moments: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(lambda lora: loss({**params, "lora": lora}, batch))(lora)
        seen = [{**frozen, "lora": tree} for tree in (gradients, lora)]
        changes, moments = optimizer.update(seen[0], moments, seen[1])
        return optax.apply_updates(lora, changes["lora"]), moments, value

    lora, losses = params["lora"], []
    moments = optimizer.init({**frozen, "lora": lora})
    for batch in batches():
        lora, moments, value = update(lora, moments, batch)
        losses.append(float(value))
    return losses, lora, moments


def _close(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        ("adamw", "three axes"),
        ("labelled", "two parts"),
        pytest.param("clipped momentum", "two parts", marks=pytest.mark.slow),
        pytest.param("factored", "three axes", marks=pytest.mark.slow),
    ],
)
def test_adapters_on_a_frozen_base_train_as_they_do_alone(optimizer: str, how: str) -> None:
    made = OPTIMIZERS[optimizer]
    found = planned(made, **MESHES[how])
    step = train_step(found, loss, init, batches()[0], made, mesh=found.make_mesh())
    state = step.init(jax.random.key(0))
    first, losses = jax.device_get({**state["params"], "noise": None}), []
    assert state["params"]["base"].addressable_data(0).size < WIDTH * WIDTH
    for batch in batches():
        state, metrics = step.update(state, jax.device_put(batch, step.batch))
        losses.append(float(metrics["loss"]))
    expected, lora, moments = plainly(made)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    _close(state["params"]["lora"], lora)
    _close(state["optimizer"], moments)
    for name in ("base", "quantised", "turns"):
        np.testing.assert_array_equal(state["params"][name], first[name])


@pytest.mark.devices(8)
def test_a_searched_plan_prices_and_runs_it() -> None:
    frozen, whole = planned(), planned(trainable={"quantised": False, "*noise": False})
    assert frozen.trainable == ("lora/a", "lora/b")
    assert whole.trainable is None
    assert frozen.estimate is not None
    assert whole.estimate is not None
    elements = 2 * RANK * WIDTH
    assert frozen.estimate.memory["optimizer"] * 8 == pytest.approx(8 * elements)
    assert whole.estimate.memory["optimizer"] * 8 == pytest.approx(8 * (elements + WIDTH * WIDTH))
    assert frozen.estimate.memory["gradients"] < whole.estimate.memory["gradients"] / 2
    state = frozen.init(init, jax.random.key(0))
    _, metrics = frozen.train_step(loss, ADAM)(state, batches()[0])
    assert float(metrics["loss"]) == pytest.approx(plainly(ADAM)[0][0], rel=1e-4)


@pytest.mark.numerics(False)
def test_gradients_of_a_frozen_base_neither_travel_nor_take_room() -> None:
    """A base of which only adapters are trained: no reduction of its gradient, no moments, less memory."""

    def shapes(trainable: Any) -> Plan:
        width = 2048
        params = {"base": (width, width), "a": (width, 8), "b": (8, width)}
        return declare(
            lambda p, b: jnp.square(jnp.tanh(b @ p["base"]) @ p["a"] @ p["b"]).mean(),
            {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in params.items()},
            jax.ShapeDtypeStruct((512, width), "float32"),
            topology="h100:8",
            mesh={"data": 8},
            optimizer=ADAM,
            trainable=trainable,
        )

    whole, frozen = shapes(None).estimate, shapes(["a", "b"]).estimate
    assert whole is not None
    assert frozen is not None
    assert whole.time["all_reduce/data"] > 4 * frozen.time.get("all_reduce/data", 0)
    assert frozen.memory["params"] == whole.memory["params"]
    assert frozen.memory["optimizer"] < whole.memory["optimizer"] / 100
    assert frozen.mfu * frozen.step_seconds < whole.mfu * whole.step_seconds


def test_the_plan_keeps_it_and_says_it() -> None:
    found = planned(**MESHES["three axes"])
    again = Plan.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.decision() == found.decision()
    assert "trainable" not in planned(**MESHES["three axes"], trainable=None).to_dict()
    assert "Trained: 2 of 6 parameters" in plain_text(plan_document(found))
    assert "not trained" in found.explain("base")
    assert "not trained" not in found.explain("lora/a")


@pytest.mark.parametrize(
    ("trainable", "wanted"),
    [
        (None, None),
        ("*", None),
        (["lora/a", "base"], ("base", "lora/a")),
        (
            {"base": False, "quantised": False, "noise": False, "turns": False, "lora": True},
            ("lora/a", "lora/b"),
        ),
        ({"lora/*": False, "lora/b": True}, ("base", "lora/b")),
        ("lora", ("lora/a", "lora/b")),
        ({"base": False}, ("lora/a", "lora/b")),
    ],
)
def test_ways_of_writing_it(trainable: Any, wanted: Any) -> None:
    assert planned(**MESHES["three axes"], trainable=trainable).trainable == wanted


@pytest.mark.parametrize(
    ("trainable", "sentence"),
    [
        ("lorra/*", r"trainable lorra/\* matches no parameter; did you mean .lora/"),
        ("quantised", "trainable quantised matches quantised of type int8, which has no gradient"),
        ({"base": True}, "trainable base: True says nothing, .* trainable='base' to train that alone"),
        ({**dict.fromkeys(SHAPES, False), "lara": True}, "trainable lara matches no parameter; did you"),
        (dict.fromkeys(SHAPES, True), "trainable has True for 'noise' of type key<fry>"),
        ({**dict.fromkeys(SHAPES, False), "lora": {"c": True}}, "trainable has 'lora/c', which no"),
        (dict.fromkeys(SHAPES, 1), "trainable has 1 for 'base'; give True or False"),
        (dict.fromkeys(SHAPES, False), "trainable leaves none of the 3 parameters of floats to train"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(trainable: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        planned(**MESHES["three axes"], trainable=trainable)
