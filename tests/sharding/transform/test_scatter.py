"""Gradients scattered in steps are those that are scattered at once, and where they were to be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshwright.sharding import declare
from meshwright.sharding.transform.constrain import constrain
from meshwright.sharding.transform.scatter import Scattering

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
    sharded = constrain(loss, devices, plan.axes_of_dims, plan.specs, plan.specs_of_moments, steps=steps)
    placed = jax.device_put(params, plan.shardings(params, devices))
    value, gradients = jax.jit(jax.value_and_grad(sharded))(
        placed, jax.device_put(batch, plan.shardings(batch, devices, "batch"))
    )
    expected, wanted = jax.value_and_grad(loss)(params, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, wanted)


def mesh_of(**axes):
    devices = np.array(jax.devices()).reshape(tuple(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes))


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
