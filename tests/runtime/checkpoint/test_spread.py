"""Shardings that hold each byte once."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from meshwright.runtime.checkpoint.spread import spread

pytestmark = pytest.mark.numerics


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("spec", "shape", "copies"),
    [
        ((), (16, 3), 1),
        (("fsdp",), (16, 3), 1),
        ((None, "fsdp"), (3, 16), 1),
        ((("data", "fsdp"),), (8,), 1),
        ((), (4, 3), 2),
        ((), (3, 5), 8),
        ((), (), 8),
    ],
)
def test_refines_a_sharding_as_far_as_the_shape_allows(spec, shape, copies) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    before = NamedSharding(mesh, PartitionSpec(*spec))
    after = spread(before, shape)
    coarse, fine = before.devices_indices_map(shape), after.devices_indices_map(shape)
    assert 8 / len({str(index) for index in fine.values()}) == copies
    for device, index in fine.items():
        # Each device keeps a part of what it held.
        held = np.zeros(shape, bool)
        held[coarse[device]] = True
        assert held[index].all()


@pytest.mark.devices(1)
def test_leaves_one_device_alone() -> None:
    place = SingleDeviceSharding(jax.devices()[0])
    assert spread(place, (8,)) is place
