"""What is saved beside a trace."""

import json

import pytest
from meshwright.runtime.profiling import save_program
from meshwright.runtime.profiling.program import load_program


@pytest.mark.devices(4)
def test_the_program_and_its_mesh_come_back(tmp_path):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices())[[2, 3, 0, 1]].reshape(1, 4), ("stage", "fsdp"))
    x = jax.ShapeDtypeStruct((8,), "float32", sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    save_program(tmp_path, jax.jit(lambda x: x.sum()).lower(x).compile(), mesh)

    record = json.loads((tmp_path / "program" / "mesh.json").read_text())
    assert record["axes"] == {"stage": 1, "fsdp": 4}
    assert [device["id"] for device in record["devices"]] == [2, 3, 0, 1]
    saved = load_program(tmp_path)
    assert saved is not None
    labels = {saved.axes(i).label for i in saved.program.instructions.values() if i.collective is not None}
    assert labels == {"fsdp"}
    with pytest.raises(ValueError, match="is not a collective"):
        saved.axes(next(i for i in saved.program.instructions.values() if i.collective is None))


def test_nothing_saved_is_none(tmp_path):
    assert load_program(tmp_path) is None
