import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshwright.sharding import UserError, make_mesh, picture


def sharded(shape, spec, mesh):
    return jax.device_put(jnp.zeros(shape, jnp.float32), NamedSharding(make_mesh(mesh), PartitionSpec(*spec)))


@pytest.mark.devices(8)
def test_each_cell_names_the_devices_that_hold_it():
    array = sharded((64, 256), ("fsdp", "tensor"), {"data": 2, "fsdp": 2, "tensor": 2})
    text = picture(array)
    layout, size = text.splitlines()[0].split(": ")
    assert layout == "float32[64, 256] as ('fsdp', 'tensor') on data=2, fsdp=2, tensor=2"
    assert size == "16.0 KiB of 64.0 KiB on each device"
    for shard in array.addressable_shards:
        rows, columns = (part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True))
        row = next(line for line in text.splitlines() if line.split("│")[0].strip() == f"{rows[0]}:{rows[1]}")
        cell = row.split("│")[1 + (columns[0] > 0)]
        assert str(shard.device.id) in cell.split()


@pytest.mark.devices(8)
def test_one_sharded_dimension_is_a_row_and_a_whole_array_one_cell():
    mesh = {"data": 8}
    assert "0:2" in picture(sharded((4, 16), (None, "data"), mesh))
    assert "│ 0 1 2 3 4 5 6 7 │" in picture(sharded((4, 4), (), mesh))


def test_something_without_a_sharding_is_refused():
    with pytest.raises(UserError, match="list has no sharding"):
        picture([1, 2])
