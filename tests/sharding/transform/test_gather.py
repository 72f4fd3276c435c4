"""Stored parameters: gradients go where they are kept, in steps or at once; tables are read row by row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshwright.sharding import Plan, declare
from meshwright.sharding.program.jaxpr import Traces
from meshwright.sharding.transform.compose import composed
from meshwright.sharding.transform.constrain import Constrain
from meshwright.sharding.transform.gather import Scattering

pytestmark = [pytest.mark.numerics, pytest.mark.devices(8)]

LAYERS, ROWS, WIDTH, HIDDEN = 2, 16, 32, 64
NAMES = {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed"), "scale": ("embed",)}


def arrays():
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape) / 8, jnp.float32)
    params = {
        "up": normal(LAYERS, WIDTH, HIDDEN),
        "down": normal(LAYERS, HIDDEN, WIDTH),
        "scale": normal(WIDTH),
    }
    return params, {"x": normal(ROWS, WIDTH), "y": normal(ROWS, WIDTH)}


def loss(params, batch):
    def layer(x, weights):
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(layer, batch["x"] * params["scale"], {"up": params["up"], "down": params["down"]})
    return jnp.square(x - batch["y"]).mean()


@pytest.mark.parametrize(
    ("mesh", "steps"),
    [
        ({"fsdp": 8}, {"fsdp": (4, 2)}),
        ({"fsdp": 8}, {"fsdp": (2, 2, 2)}),
        ({"fsdp": 4, "tensor": 2}, {"fsdp": (2, 2)}),
        ({"data": 2, "fsdp": 4}, {"fsdp": (2, 2), "data": (2,)}),
    ],
)
def test_values_are_those_of_the_unsharded_function(mesh, steps):
    params, batch = arrays()
    plan = declare(loss, params, batch, topology="cpu:8", mesh=mesh, names=NAMES)
    devices = plan.make_mesh()

    def passes(program, params):
        specs = [
            jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
            for tree in (plan.specs(params), plan.specs_of_moments(params))
        ]
        axes, scattering = plan.axes_of_dims(program), Scattering(devices, steps)
        return [Constrain(program, devices, axes, stored=specs[0], reduced=specs[1], scattering=scattering)]

    sharded = composed(Traces(loss), passes)
    placed = jax.device_put(params, plan.shardings(params, devices))
    value, gradients = jax.jit(jax.value_and_grad(sharded))(
        placed, jax.device_put(batch, plan.shardings(batch, devices, "batch"))
    )
    expected, wanted = jax.jit(jax.value_and_grad(loss))(params, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, wanted)


def mesh_of(**axes):
    devices = np.array(jax.devices()).reshape(tuple(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes))


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_number_that_is_stored_beside_arrays(mesh):
    def averaged(params, batch, state):
        decay = 1.0 - 1.0 / (10.0 + state["count"])
        means = jax.tree.map(lambda old, new: state["count"] * (old * decay + new), state["means"], params)
        return loss(params, batch), ({}, {"count": state["count"] + 1, "means": means})

    params, batch = arrays()
    state = {"count": jnp.float32(3), "means": params}
    plan = declare(averaged, params, batch, state=state, topology="cpu:8", mesh=mesh, names=NAMES)
    found = jax.jit(plan.apply(averaged))(params, batch, state)
    for one, other in zip(*map(jax.tree.leaves, (found, averaged(params, batch, state))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_step_leaves_each_device_what_its_next_step_divides():
    scattering = Scattering(mesh_of(fsdp=8), {"fsdp": (4, 2)})
    first, last = scattering.shardings(PartitionSpec(), PartitionSpec("fsdp"))
    assert last.spec == PartitionSpec("fsdp")
    assert first.shard_shape((16, 3)) == (4, 3)
    halves = zip(
        first.devices_indices_map((16,)).items(), last.devices_indices_map((16,)).items(), strict=True
    )
    for (device, outer), (same, inner) in halves:
        assert device == same
        assert outer[0].start <= inner[0].start < inner[0].stop <= outer[0].stop


def test_steps_go_below_the_axes_that_an_array_is_computed_over():
    scattering = Scattering(mesh_of(fsdp=4, tensor=2), {"fsdp": (2, 2)})
    below = scattering.shardings(PartitionSpec("tensor"), PartitionSpec(("tensor", "fsdp")))
    assert [one.shard_shape((16,)) for one in below] == [(4,), (2,)]
    beside = scattering.shardings(PartitionSpec(None, "tensor"), PartitionSpec("fsdp", "tensor"))
    assert [one.shard_shape((16, 16)) for one in beside] == [(8, 8), (4, 8)]


def test_what_does_not_nest_or_has_no_steps_goes_at_once():
    mesh = mesh_of(fsdp=4, tensor=2)
    above = Scattering(mesh, {"fsdp": (2, 2)}).shardings(
        PartitionSpec("tensor"), PartitionSpec(("fsdp", "tensor"))
    )
    assert above[0] == NamedSharding(mesh, PartitionSpec("tensor"))
    plain = Scattering(mesh, {}).shardings(PartitionSpec(), PartitionSpec("fsdp"))
    assert plain == [NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("fsdp"))]


def test_steps_that_are_not_the_axis():
    with pytest.raises(ValueError, match=r"steps of \(4, 4\) are not fsdp=8"):
        Scattering(mesh_of(fsdp=8), {"fsdp": (4, 4)})


LINES, SEQUENCE, VOCAB, EMBED = 16, 8, 64, 24
TABLE_NAMES = {"table": ("vocab", "embed"), "up": ("embed", "mlp")}
MESHES = (
    {"tensor": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
)


def table() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "table": random.normal(size=(VOCAB, EMBED)).astype(np.float32),
        "up": random.normal(size=(EMBED, 32)).astype(np.float32),
    }


def lines(ids: np.ndarray[Any, Any] | None = None) -> dict[str, Any]:
    random = np.random.default_rng(1)
    found = random.integers(0, VOCAB, (LINES, SEQUENCE), dtype=np.int32) if ids is None else ids
    return {"ids": found, "weight": random.normal(size=(LINES, SEQUENCE, 32)).astype(np.float32)}


def looked_up(**how: Any) -> Any:
    def loss(params: Any, batch: Any) -> Any:
        rows = params["table"].at[batch["ids"]].get(**how)
        return (jnp.tanh(rows @ params["up"]) * batch["weight"]).mean()

    return loss


def planned(loss: Any, mesh: dict[str, int]) -> tuple[Plan, Any]:
    # As the planner lays a decoder's stream between its layers: cut over what cuts the table's rows.
    rules = {"sequence": "tensor", "mlp": None}
    plan = declare(loss, table(), lines(), topology="cpu:8", mesh=mesh, names=TABLE_NAMES, rules=rules)
    return plan, jax.jit(jax.value_and_grad(plan.apply(loss, plan.make_mesh())))


@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_gradients_of_a_table_cut_by_rows(mesh: dict[str, int]) -> None:
    loss = looked_up()
    plan, step = planned(loss, mesh)
    assert plan.dims["vocab"].axes == ("tensor",)
    value, gradients = step(table(), lines())
    expected, reference = jax.jit(jax.value_and_grad(loss))(table(), lines())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, reference[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.devices(8)
@pytest.mark.parametrize("how", [{"mode": "clip"}, {"mode": "fill", "fill_value": 0.0}], ids=str)
def test_ids_outside_of_the_table(how: dict[str, Any]) -> None:
    """They count as they do unsharded: read and learnt at the edge, or not at all."""
    loss = looked_up(**how)
    ids = np.random.default_rng(2).integers(-VOCAB // 2, 2 * VOCAB, (LINES, SEQUENCE), dtype=np.int32)
    _, step = planned(loss, {"fsdp": 2, "tensor": 4})
    _, gradients = step(table(), lines(ids))
    reference = jax.jit(jax.grad(loss))(table(), lines(ids))
    assert np.abs(reference["table"]).max() > 0
    np.testing.assert_allclose(gradients["table"], reference["table"], rtol=1e-5, atol=1e-7)


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_no_device_holds_the_whole_table_or_its_gradient(mesh: dict[str, int]) -> None:
    plan, step = planned(looked_up(), mesh)
    placed = plan.make_mesh()
    given = [
        jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), tree, where)
        for tree, where in (
            (table(), plan.shardings(table(), placed)),
            (lines(), plan.shardings(lines(), placed, "batch")),
        )
    ]
    program = step.lower(*given).compile().as_text()
    assert f"[{VOCAB // mesh['tensor']},{EMBED}]" in program
    assert f"[{VOCAB},{EMBED}]" not in program
