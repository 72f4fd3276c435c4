"""What a process says on the side where plugins are installed for devices that are not there."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
from meshwright.sharding.hardware import attached

USES_DEVICES = """
from meshwright.runtime import simulate
from meshwright.sharding import Topology

simulate(2)
print(Topology.local())
"""
# A step is lowered for a pod: JAX looks for devices of its own, and none is used.
VERIFIES = """
import os
import jax.numpy as jnp
import optax
from jax import ShapeDtypeStruct as Shape
from meshwright.sharding import plan

before = dict(os.environ)
found = plan(
    lambda w, x: jnp.mean(x @ w), Shape((64, 64), "float32"), Shape((64, 64), "float32"),
    topology="v5e:2x4", optimizer=optax.sgd(0.1),
)
print(f"not on a cpu, in {found.verify(quick=True).proof.peak_bytes} bytes")
assert dict(os.environ) == before
"""
IMPORTS = """
import logging, os, sys
import jax

def loggers():
    known = {"root": logging.root, **logging.root.manager.loggerDict}
    real = {name: one for name, one in known.items() if isinstance(one, logging.Logger)}
    return {name: (one.level, list(one.handlers)) for name, one in real.items()}

before, levels = (dict(os.environ), dict(jax.config.values), list(sys.path)), loggers()
import meshwright.sharding
from meshwright.sharding import Plan, Topology, declare, plan, train_step
assert (dict(os.environ), dict(jax.config.values), list(sys.path)) == before
assert {name: level for name, level in loggers().items() if name in levels} == levels
"""


@pytest.mark.skipif(bool(attached.attached_accelerators()), reason="there is an accelerator to be told of")
@pytest.mark.parametrize(
    "arguments",
    [("-c", USES_DEVICES), ("-c", VERIFIES), ("-m", "pytest", "-q", "-s", "test_of_a_user.py")],
    ids=["simulates", "verifies", "tests"],
)
def test_installed_plugins_of_absent_devices_say_nothing(
    arguments: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "test_of_a_user.py").write_text(
        "import jax, pytest\n\n@pytest.mark.devices(2)\ndef test_devices():\n    print(jax.devices())\n"
    )
    variables = {name for quiet in attached.QUIETING.values() for name in quiet} | {"JAX_PLATFORMS"}
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stderr == ""
    assert "cpu" in process.stdout.lower()


def test_importing_changes_nothing_in_the_process() -> None:
    """It may be one that owns devices, whose plugins have something to say."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("shown", "kinds"),
    [
        (("dev/nvidia0", "dev/nvidiactl"), ("gpu",)),
        (("proc/driver/nvidia/gpus/0000:01:00.0",), ("gpu",)),
        (("dev/dxg",), ("gpu",)),
        (("dev/accel0",), ("tpu",)),
        (("dev/vfio/vfio", "dev/vfio/0"), ("tpu",)),
        (("dev/vfio/vfio", "dev/nvme0", "dev/kfd"), ("rocm",)),
        ((), ()),
    ],
)
def test_variables_are_set_only_where_the_device_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, shown: tuple[str, ...], kinds: tuple[str, ...]
) -> None:
    for sign in shown:
        (tmp_path / sign).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / sign).touch()
    environment: dict[str, str] = {"TPU_LOG_DIR": "mine"}
    monkeypatch.setattr(attached, "_ROOT", tmp_path)
    monkeypatch.setattr(os, "environ", environment)
    assert attached.attached_accelerators() == kinds
    attached.quiet_absent()
    assert ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK" in environment) == ("gpu" not in kinds)
    assert ("TPU_SKIP_MDS_QUERY" in environment) == ("tpu" not in kinds)
    assert environment["TPU_LOG_DIR"] == "mine"
