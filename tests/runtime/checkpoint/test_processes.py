"""Several processes save one state together and agree on which checkpoint they restore."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.numerics


@pytest.mark.processes(2, devices=2, timeout_seconds=120)
def test_processes_agree_on_the_checkpoint_before_a_damaged_one(shared_path) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from meshwright.runtime.checkpoint import Checkpoints, list_checkpoints

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))
    specs = {
        "sharded": PartitionSpec(("data", "fsdp")),
        "replicated": PartitionSpec(),
        "step": PartitionSpec(),
    }
    shapes = {"sharded": (512, 1024), "replicated": (8, 3), "step": ()}

    def make(step):
        return {
            name: jax.jit(
                lambda shape=shape: (
                    jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape) + step
                ),
                out_shardings=NamedSharding(mesh, specs[name]),
            )()
            for name, shape in shapes.items()
        }

    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
    with Checkpoints(shared_path) as checkpoints:
        assert checkpoints.restore(wanted) is None
        for step in (1, 2, 3):
            checkpoints.save(step, make(step), metadata={"position": step})
        checkpoints.wait()
        multihost_utils.sync_global_devices("saved")
        if jax.process_index() == 0:
            assert all(record.good for record in list_checkpoints(shared_path, verify=True))
            # Step 3: a byte of the array that process 1 wrote. Step 2: a file is gone.
            written = list((shared_path / "3" / "state" / "ocdbt.process_1").rglob("*"))
            path = max((p for p in written if p.is_file()), key=lambda p: p.stat().st_size)
            data = bytearray(path.read_bytes())
            assert len(data) > 2**20
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            (shared_path / "2" / "state" / "_METADATA").unlink()
        multihost_utils.sync_global_devices("damaged")
        restored = checkpoints.restore(wanted)
        assert restored is not None
        assert (restored.step, restored.metadata) == (1, {"position": 1})
        for name, want in make(1).items():
            got = restored.state[name]
            assert got.sharding == want.sharding
            for mine, right in zip(got.addressable_shards, want.addressable_shards, strict=True):
                np.testing.assert_array_equal(np.asarray(mine.data), np.asarray(right.data))
        multihost_utils.sync_global_devices("restored")
        assert sorted(path.name for path in (shared_path / "damaged").iterdir()) == ["2", "3"]
