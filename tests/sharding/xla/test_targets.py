"""What the real compilers make of described topologies, in processes that hold one compiler each."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from meshwright.sharding import Topology, UserError
from meshwright.sharding.hardware.chip import chips
from meshwright.sharding.xla.gpu_targets import gpu_target_names
from meshwright.sharding.xla.targets import describe, domains, missing

# Read by nobody but a process that has no accelerator, so they would hide what `describe` has to set itself.
QUIETING = ("TPU_", "JAX_SKIP_CUDA", "ALLOW_MULTIPLE_LIBTPU")

DESCRIBED = """
import json, sys
from meshwright.sharding import Topology
from meshwright.sharding.xla.targets import describe

# Devices of a single slice may not say which it is.
def slice_of(device):
    return getattr(device, "slice_index", 0)

answers = []
for text in sys.argv[1:]:
    devices = describe(Topology.parse(text)).devices
    found = Topology.of(devices)
    answers.append({
        "topology": str(found),
        "hosts": found.num_hosts,
        "devices": len(devices),
        "processes": len({(slice_of(device), device.process_index) for device in devices}),
        "slices": len({slice_of(device) for device in devices}),
        "chips": len({(slice_of(device), *device.coords) for device in devices}),
    })
print(json.dumps(answers))
"""

# A parameter stored in shards, gathered at use; its gradient goes back to its shard.
COMPILED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from meshwright.sharding import Topology
from meshwright.sharding.xla.targets import describe

def loss(weight, batch):
    weight = jax.lax.all_gather(weight, "fsdp", axis=1, tiled=True)
    return jax.lax.psum(jnp.sum((batch @ weight).astype(jnp.float32) ** 2), "fsdp")

answers = []
for text in sys.argv[1:]:
    topology = Topology.parse(text)
    devices = describe(topology).devices
    # Coordinates count up along the mesh axis, within each slice where there are several.
    size = topology.devices_per_slice
    per_slice = [devices[at : at + size] for at in range(0, len(devices), size)]
    laid = np.concatenate([create_device_mesh((len(each),), each) for each in per_slice])
    mesh = Mesh(laid, ("fsdp",))
    specs = P(None, "fsdp"), P("fsdp")
    sharded = [NamedSharding(mesh, spec) for spec in specs]
    arrays = [jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=each) for each in sharded]
    step = jax.grad(jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P()))
    compiled = jax.jit(step, out_shardings=sharded[0]).lower(*arrays).compile()
    program, sizes = compiled.as_text(), compiled.memory_analysis()
    header = program.partition("\\n")[0]
    answers.append({
        "scheduled": "is_scheduled=true" in header,
        "gathers": program.count(" all-gather(") + program.count(" all-gather-start("),
        "partitions": int(header.partition("num_partitions=")[2].partition(",")[0]),
        "crosses_slices": "xla_megascale_runtime" in program,
        "peak": sizes.peak_memory_in_bytes,
        "arguments": sizes.argument_size_in_bytes,
        "kind": mesh.devices.flat[0].device_kind,
    })
print(json.dumps(answers))
"""


def asked(script: str, *texts: str) -> list[dict[str, Any]]:
    """Run `script` on `texts` in a process of its own, which must not say anything on the side."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(QUIETING)}
    process = subprocess.run(
        [sys.executable, "-c", script, *texts],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    return json.loads(process.stdout)


def slices(name: str) -> list[str]:
    """Every small slice of a TPU in every order of its axes, and cubes up to the largest here and there."""
    chip = chips()[name]
    shapes = {order for small in chip.small_slices for order in itertools.permutations(small)}
    if chip.cube:
        shapes |= set(itertools.product((4, 8), repeat=3)) | {(4, 4, 12), (4, 8, 28), (16, 16, 16)}
    written = ["x".join(map(str, shape)) for shape in sorted(shapes)]
    return [f"{name}:{shape}" for shape in written] + [f"3*{name}:{shape}" for shape in written]


TPUS = tuple(name for name, chip in chips().items() if chip.torus_dims)


def test_every_tpu_slice_is_what_the_compiler_says() -> None:
    texts = [text for name in TPUS for text in slices(name)]
    assert TPUS == ("v4", "v5e", "v5p", "v6e", "tpu7x")
    for text, said in zip(texts, asked(DESCRIBED, *texts), strict=True):
        topology = Topology.parse(text)
        assert said == {
            "topology": text,
            "hosts": topology.num_hosts,
            "devices": topology.num_devices,
            "processes": topology.num_hosts,
            "slices": topology.num_slices,
            "chips": topology.num_chips,
        }, text


def test_gpus_come_by_hosts_and_devices() -> None:
    texts = [f"{name}:{shape}" for name in gpu_target_names() for shape in ("1", "4", "2x2", "16x4")]
    assert {"a100", "h100", "h200", "b200"} <= set(gpu_target_names())
    for text, said in zip(texts, asked(DESCRIBED, *texts), strict=True):
        topology = Topology.parse(text)
        assert (said["topology"], said["devices"]) == (text, topology.num_devices)
        assert said["processes"] == said["hosts"] == topology.num_hosts


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("h100:4x8", "4x1x8"),
        ("h100:4x2", "4x1x2"),
        ("h100:8", "1x1x8"),
        ("gb200:36x4", "2x18x4"),
        ("gb200:20x4", "2x10x4"),
        ("gb200:19x4", "19x1x4"),
    ],
)
def test_gpus_are_counted_by_nvlink_domains(text: str, counted: str) -> None:
    assert domains(Topology.parse(text)) == counted


def test_a_sharded_program_compiles_for_every_tpu() -> None:
    check_compiled("v4:2x2x1", "v5e:2x2", "v5p:4x4x4", "2*v6e:2x2", "tpu7x:2x2x1")


def test_a_sharded_program_compiles_for_every_gpu() -> None:
    check_compiled("a100:2x8", "a100-40gb:8", "h100:2x8", "h200:2x8", "b200:2x8", "gb200:4x4")


def check_compiled(*texts: str) -> None:
    for text, said in zip(texts, asked(COMPILED, *texts), strict=True):
        topology = Topology.parse(text)
        whole = 1024 * 1024 * 2
        assert said["scheduled"], text
        # A program of several slices is that of each slice; the network between them is the host's business.
        assert said["partitions"] == topology.devices_per_slice, text
        assert said["crosses_slices"] == (topology.num_slices > 1), text
        # Without its wraparound links v5p:4x4x4 adds up arrays filled with zeros rather than gather.
        assert said["gathers"] >= 1, text
        assert said["kind"] in topology.chip.device_kinds
        assert said["arguments"] == 2 * whole / topology.num_devices
        assert said["arguments"] + whole <= said["peak"] <= said["arguments"] + 4 * whole, text


@pytest.mark.parametrize(
    "text", ["v5e:3x5", "v5p:4x4", "v6e:16x32", "v4:16x16x20", "h100:2x9", "v5p:2x2x8", "2*h100:4x8"]
)
def test_what_does_not_exist_is_refused_before_a_compiler_is_asked(text: str) -> None:
    with pytest.raises(UserError):
        Topology.parse(text)


@pytest.mark.parametrize(
    ("text", "absent", "sentence"),
    [
        ("v5p:4x4x8", "libtpu", "compiling for v5p:4x4x8 needs libtpu, which is not installed: "),
        (
            "h100:4x8",
            "jax-cuda13-plugin",
            "compiling for h100:4x8 needs JAX's CUDA plugin, which is not installed: ",
        ),
    ],
)
def test_a_missing_compiler_is_said_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, text: str, absent: str, sentence: str
) -> None:
    topology = Topology.parse(text)
    assert missing(topology) is None
    pretend(monkeypatch, {absent: None})
    assert missing(topology) == sentence + 'pip install "meshwright[verify]"'
    with pytest.raises(UserError, match="is not installed"):
        describe(topology)


def test_a_plugin_of_another_version_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"jax-cuda13-plugin": "0.9.9"})
    reason = missing(Topology.parse("b200:8")) or ""
    assert "needs a CUDA plugin of jaxlib's version" in reason
    assert "but jax-cuda13-plugin is 0.9.9: pip install" in reason


@pytest.mark.parametrize("text", ["mi300x:8", "cpu:8"])
def test_chips_without_a_compiler_are_told_from_a_missing_one(text: str) -> None:
    with pytest.raises(
        UserError, match=f"there is no compiler for {text} .* there is one for TPUs and for a100"
    ):
        describe(Topology.parse(text))


def pretend(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Have the installation show other versions of some distributions, or none."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions.get(name, "") if name in versions else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
