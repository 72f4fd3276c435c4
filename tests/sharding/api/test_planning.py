"""Planned functions against unsharded ones, and plans as records of how they came about."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshwright.sharding import Plan, Topology, UserError, plan
from meshwright.sharding.planner.build import record_of
from meshwright.sharding.planner.declared import Declared
from meshwright.sharding.planner.inputs import Problem
from meshwright.sharding.words import seconds

pytestmark = pytest.mark.numerics

ADAM = optax.adamw(1e-2)


@functools.cache
def jitted(loss: Any) -> Any:
    """The unsharded loss and its gradients, compiled once for all layouts that are held to them."""
    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def case_of(name: str) -> zoo.Case:
    """A model whose loss is one function for all tests."""
    return zoo.MODELS[name]()


def agrees(loss: Any, planned: Plan, params: Any, batch: Any) -> None:
    """Check loss to 1e-6 and gradients to 1e-5 of their largest, in float32."""
    mesh = planned.make_mesh()
    placed = jax.device_put(
        (params, batch), (planned.shardings(params, mesh), planned.shardings(batch, mesh, "batch"))
    )
    value, gradients = jitted(loss)(params, batch)
    got, sharded = jax.jit(jax.value_and_grad(planned.apply(loss)))(*placed)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(sharded), strict=True):
        assert np.abs(np.asarray(other) - np.asarray(one)).max() <= 1e-5 * max(np.abs(one).max(), 1e-3)
    moments = jax.tree.leaves(planned.specs_of_moments(params))
    for gradient, spec in zip(jax.tree.leaves(sharded), moments, strict=True):
        wanted = jax.sharding.NamedSharding(mesh, spec)
        assert gradient.sharding.is_equivalent_to(wanted, gradient.ndim)


# Without XLA's optimisations a U-Net's convolutions add one product after another, which is 1e-6 off on some
# processors. With them it compiles for long.
MARKS = {
    "unet": (pytest.mark.numerics(False, optimised=True), pytest.mark.slow),
    **dict.fromkeys(("encoder_decoder", "state_space", "vision_transformer"), pytest.mark.slow),
}


@pytest.mark.primitives
@pytest.mark.devices(8)
@pytest.mark.parametrize("name", [pytest.param(one, marks=MARKS.get(one, ())) for one in zoo.MODELS])
def test_models_that_nobody_annotated_run_planned_as_unsharded(name: str) -> None:
    case = case_of(name)
    params, batch = case.arrays()
    planned = plan(case.loss, params, batch, topology="cpu:8", optimizer=ADAM)
    total = sum(math.prod(row.shape) for row in planned.params.values())
    for path, row in planned.params.items():
        assert row.spec or math.prod(row.shape) < 0.03 * total, path
    assert planned.bytes_per_device() < 4 * total / 8 * 1.3
    assert math.prod(planned.mesh.values()) == 8
    assert planned.estimate is not None
    assert planned.estimate.step_seconds > 0
    agrees(case.loss, planned, params, batch)


@functools.cache
def small(name: str) -> Any:
    """Return a small case, its arrays, and its spaces without and with microbatches."""
    case = case_of(name)
    params, batch = case.arrays()
    problem = Problem(loss=case.loss, params=params, batch=batch, optimizer=ADAM, names=None)
    found = problem.space(Topology.parse("cpu:8"), Declared())
    return case, params, batch, problem.program, list(found.candidates())


@pytest.mark.once("sharding/transform/test_constrain.py")
@pytest.mark.devices(8)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["mlp", "lstm", "mixture_of_experts", "graph_net"]), data=st.data())
def test_any_candidate_of_the_space_keeps_values(name: str, data: Any) -> None:
    case, params, batch, program, candidates = small(name)
    candidate = candidates[data.draw(st.integers(0, len(candidates) - 1))]
    agrees(case.loss, Plan.of(record_of(program, Topology.parse("cpu:8"), candidate)), params, batch)


@pytest.mark.devices(8)
@pytest.mark.once("sharding/transform/test_step.py")
def test_it_trains_as_one_device_does() -> None:
    case = case_of("state_space")
    params, batch = case.arrays()
    planned = plan(case.loss, params, batch, topology="cpu:8", optimizer=ADAM, mesh={"data": 2, "fsdp": 2})
    assert planned.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    step = planned.train_step(case.loss, ADAM)
    state = planned.init(case.init, jax.random.key(3))
    alone = {"params": case.init(jax.random.key(3))}
    alone["optimizer"] = ADAM.init(alone["params"])
    update = jax.jit(ADAM.update)
    for _ in range(3):
        state, metrics = step(state, batch)
        loss, gradients = jitted(case.loss)(alone["params"], batch)
        updates, alone["optimizer"] = update(gradients, alone["optimizer"], alone["params"])
        alone["params"] = optax.apply_updates(alone["params"], updates)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    assert int(state["step"]) == 3
    moments = [leaf for leaf in jax.tree.leaves(state["optimizer"]) if leaf.shape == (2, 32, 128)]
    assert {leaf.addressable_shards[0].data.size for leaf in moments} <= {1024, 2048}


@pytest.fixture(scope="module")
def planned() -> Plan:
    case = zoo.encoder_decoder()
    return plan(case.loss, *case.shapes(), topology="v5e:2x4", optimizer=ADAM)


def test_saved_and_loaded_it_is_the_same(planned: Plan, tmp_path: pathlib.Path) -> None:
    planned.save(tmp_path / "x.plan.json")
    loaded = Plan.load(tmp_path / "x.plan.json")
    assert loaded == planned
    assert loaded.explain() == planned.explain()
    assert loaded.estimate == planned.estimate
    with pytest.raises(UserError, match="knows no optimizer"):
        loaded.init(zoo.encoder_decoder().init, jax.random.key(0))


def test_it_refuses_another_program_with_what_differs(planned: Plan) -> None:
    case = zoo.encoder_decoder()
    params, batch = case.shapes()
    planned.check(params, batch, case.loss)
    with pytest.raises(UserError, match=r"another program on the same arrays: .*tanh 5 times instead of 4"):
        planned.check(params, batch, lambda p, b: jnp.tanh(case.loss(p, b)))


def test_alternatives_have_reasons_with_numbers(planned: Plan) -> None:
    assert planned.alternatives
    assert planned.estimate is not None
    for row in planned.alternatives:
        assert any(character.isdigit() for character in row.lost) or "as long" in row.lost
        assert math.prod(row.mesh.values()) == 8
        if row.fits:
            assert row.estimate.step_seconds >= planned.estimate.step_seconds


def test_declared_parts_are_kept() -> None:
    case = zoo.state_space()
    made = plan(
        case.loss,
        *case.shapes(),
        topology="v5e:2x4",
        mesh={"tensor": 2},
        rules={"*/out": [None, "tensor", "fsdp"], "batch": ["data"]},
        remat="full",
        microbatches=2,
    )
    assert made.mesh["tensor"] == 2
    assert (made.remat, made.microbatches) == ("full", 2)
    assert made.params["layers/out"].spec[1] == "tensor"
    assert made.batch["tokens"].spec in ((), ("data",))
    assert any("no optimizer" in note for note in made.notes)


@pytest.mark.parametrize(
    ("name", "declared", "message"),
    [
        ("resnet", {"microbatches": 2}, "a sum over the examples comes back.*vision.py"),
        ("graph_net", {"microbatches": 2}, "examples are looked up at computed places.*graphs.py"),
        ("mlp", {"remat": "full"}, "no scan over layers"),
        ("mlp", {"mesh": {"data": 5}}, "data=5 does not divide 8 devices"),
        ("mlp", {"mesh": {"data": 16}}, "data=16"),
        ("mlp", {"mesh": {"tensor": 3}}, "tensor=3"),
        ("mlp", {"rules": {"heads": "tensor"}}, "heads"),
        ("mlp", {"topology": "v5q:2x2"}, "v5q"),
        ("mlp", {"mesh": {"expert": 2}}, "expert"),
    ],
)
def test_contradictions_are_one_sentence(name: str, declared: dict[str, Any], message: str) -> None:
    case = zoo.MODELS[name]()
    with pytest.raises(UserError, match=message) as error:
        plan(case.loss, *case.shapes(), **{"topology": "cpu:8", **declared})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["decoder", "lstm"])
def test_weighted_means_and_rows_written_into_a_loss_go_in_parts(name: str) -> None:
    case = zoo.MODELS[name]()
    assert plan(case.loss, *case.shapes(), topology="cpu:8", microbatches=2).microbatches == 2


@pytest.mark.once("sharding/transform/accumulation/test_run.py")
@pytest.mark.devices(8)
def test_a_sum_over_the_batch_is_the_same_in_parts() -> None:
    case = zoo.mlp()

    def loss(params: Any, batch: Any) -> Any:
        return jnp.sum((batch["x"] @ params["layers"][0]["linear"]["weight"].T) ** 2)

    params, batch = case.arrays()
    made = plan(loss, params, batch, topology="cpu:8", microbatches=2)
    np.testing.assert_allclose(jax.jit(made.apply(loss))(params, batch), loss(params, batch), rtol=1e-5)


def large() -> Any:
    def loss(params: Any, batch: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(x @ w), None

        return jnp.mean(jax.lax.scan(layer, batch["x"], params["w"])[0] ** 2)

    params = {"w": jax.ShapeDtypeStruct((16, 16384, 16384), jnp.float32)}
    return loss, params, {"x": jax.ShapeDtypeStruct((64, 16384), jnp.float32)}


@pytest.mark.once("frozen/test_frozen.py")
def test_what_does_not_fit_is_said_with_what_would() -> None:
    with pytest.raises(UserError) as error:
        plan(*large(), topology="v5e:2x2", optimizer=ADAM)
    message = str(error.value)
    assert "GiB too much" in message
    assert "v5e:2x4" in message or "v5e:4x4" in message
    assert plan(*large(), topology="v5e:4x8", optimizer=ADAM).estimate is not None


def test_stages_are_priced_and_kept_and_gpipe_is_not_run(tmp_path: pathlib.Path) -> None:
    case = zoo.state_space()
    given = {"topology": "cpu:8", "optimizer": ADAM, "mesh": {"stage": 2}, "schedule": "1f1b"}
    made = plan(case.loss, *case.shapes(), **given)
    assert (made.schedule, made.interleave) == ("1f1b", 1)
    assert made.estimate is not None
    assert made.estimate.time["bubble"] > 0
    made.save(tmp_path / "x.plan.json")
    assert Plan.load(tmp_path / "x.plan.json") == made
    gpipe = dataclasses.replace(made, schedule="gpipe")
    with pytest.raises(UserError, match=r"stage=2 runs in 1F1B .* schedule='gpipe' .* cannot be run yet"):
        gpipe.apply(case.loss)


@pytest.mark.once("frozen/test_frozen.py")
def test_stages_that_were_not_searched_for_are_priced_when_asked_for() -> None:
    case = zoo.state_space()
    made = plan(case.loss, *case.shapes(), topology="v5p:2x2x1", optimizer=ADAM)
    told = made.explain("stage=2")
    declared = plan(case.loss, *case.shapes(), topology="v5p:2x2x1", optimizer=ADAM, mesh={"stage": 2})
    assert declared.estimate is not None
    assert told.startswith("not stage=2: at its best (")
    assert seconds(declared.estimate.step_seconds) in told
    assert "stage=3 does not divide 4 devices" in made.explain("stage=3")


@pytest.mark.once("sharding/transform/test_constrain.py")
@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["decoder", pytest.param("state_space", marks=pytest.mark.slow)])
def test_a_stream_cut_over_the_tensor_axis_keeps_values(name: str) -> None:
    case = case_of(name)
    params, batch = case.arrays()
    problem = Problem(loss=case.loss, params=params, batch=batch, optimizer=ADAM, names=None)
    where = Topology.parse("cpu:8")
    layouts = problem.space(where, Declared(mesh={"data": 2, "fsdp": 1, "tensor": 4})).layouts
    of_parameters = {d for a in problem.program.parameters for c in a.dims for d in c}
    cut = [
        layout
        for layout in layouts
        if any("tensor" in axes and dim not in of_parameters for dim, axes in layout.dims.items())
    ]
    assert cut
    agrees(case.loss, Plan.of(record_of(problem.program, where, cut[0])), params, batch)


@pytest.mark.once("sharding/transform/test_remat.py")
@pytest.mark.devices(8)
def test_named_values_are_kept_and_keep_values(tmp_path: pathlib.Path) -> None:
    case = case_of("state_space")
    params, batch = case.arrays()
    mesh = {"data": 2, "fsdp": 4}
    saved = {"in": "device", "layer:in": "host"}
    made = plan(case.loss, params, batch, topology="cpu:8", optimizer=ADAM, mesh=mesh, remat={"in": "device"})
    assert (made.remat, made.saved) == ("names", {"in": "device"})
    made.save(tmp_path / "x.plan.json")
    assert Plan.load(tmp_path / "x.plan.json") == made
    agrees(case.loss, made, params, batch)
    described = plan(case.loss, params, batch, topology="v5e:2x4", optimizer=ADAM, remat=saved)
    assert described.saved == saved
    assert "layer:in on the host" in described.explain()
    with pytest.raises(UserError, match="no layer has a value named 'inn'; did you mean 'in'"):
        plan(case.loss, params, batch, topology="cpu:8", remat={"inn": "device"})
