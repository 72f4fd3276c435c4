"""Wall-clock loops."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from meshwright.runtime.calibrate.loops import Clock


@pytest.mark.devices(8)
@pytest.mark.parametrize("devices", [1, 8])
def test_no_run_over_simulated_devices_starts_before_the_one_before_has_ended(devices, monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
    array = jax.device_put(np.ones(8, np.float32), NamedSharding(mesh, PartitionSpec("x")))
    runs = {"open": 0, "most": 0}

    def started(value):
        runs["open"] += 1
        runs["most"] = max(runs["most"], runs["open"])
        return value

    def waited(value):
        runs["open"] = 0
        return value

    monkeypatch.setattr(jax, "jit", lambda function: started)
    monkeypatch.setattr(jax, "block_until_ready", waited)
    assert Clock.within(1.0).seconds(abs, array) is not None
    # Those of one device go on behind one another, as in training.
    assert (runs["most"] > 1) == (devices == 1)
