from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from meshwright.sharding import Topology, UserError
from meshwright.sharding.hardware.chip import chip_named, chip_of_device_kind, chips


@pytest.mark.parametrize(
    ("text", "devices", "chips_", "hosts", "per_host", "wrap"),
    [
        ("cpu:8", 8, 8, 1, 8, ()),
        ("cpu:2x4", 8, 8, 2, 4, ()),
        ("v5p:4x4x8", 128, 128, 32, 4, (True, True, True)),
        ("v5p:2x4x4", 32, 32, 8, 4, (False, False, False)),
        ("v4:2x2x2", 8, 8, 2, 4, (False, False, False)),
        ("v4:4x4x4", 64, 64, 16, 4, (True, True, True)),
        ("2*v5e:16x16", 512, 512, 128, 4, (True, True)),
        ("v6e:8x16", 128, 128, 32, 4, (False, True)),
        ("v5e:2x4", 8, 8, 1, 8, (False, False)),
        ("v5e:4x4", 16, 16, 4, 4, (False, False)),
        ("v5e:1x1", 1, 1, 1, 1, (False, False)),
        ("tpu7x:4x4x4", 128, 64, 16, 8, (True, True, True)),
        ("tpu7x:2x2x1", 8, 4, 1, 8, (False, False, False)),
        ("h100:16x8", 128, 128, 16, 8, ()),
        ("mi300x:4x8", 32, 32, 4, 8, ()),
        ("gb200:36x4", 144, 144, 36, 4, ()),
    ],
)
def test_parse(text, devices, chips_, hosts, per_host, wrap):
    topology = Topology.parse(text)
    assert str(topology) == text
    assert Topology.parse(str(topology)) == topology
    assert (topology.num_devices, topology.num_chips) == (devices, chips_)
    assert (topology.num_hosts, topology.devices_per_host) == (hosts, per_host)
    assert topology.wrap == wrap
    assert topology.is_torus == bool(wrap)


def test_other_spellings_have_one_canonical_form():
    assert str(Topology.parse(" V5P : 4x4x8 ")) == "v5p:4x4x8"
    assert str(Topology.parse("h100:1x8")) == "h100:8"
    assert str(Topology.parse("1*v5litepod:4x4")) == "v5e:4x4"
    assert str(Topology.parse("a100-80gb:2x8")) == "a100:2x8"


def test_fast_domains():
    assert Topology.parse("h100:16x8").num_domains == 16
    assert Topology.parse("gb200:36x4").devices_per_domain == 72
    assert Topology.parse("gb200:4x4").devices_per_domain == 16
    assert Topology.parse("2*tpu7x:4x4x4").devices_per_domain == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p:4x4", "'v5p:4x4' has 2 dimensions, but a v5p slice has 3 (AxBxC), as in v5p:2x4x4"),
        ("v5e:16x17", "'v5e:16x17': an axis of a v5e slice is at most 16, not 17; nearest: v5e:16x16"),
        ("v5e:3x5", "'v5e:3x5' is no v5e slice; nearest: v5e:4x4"),
        ("v5p:3x4x4", "'v5p:3x4x4' is no v5p slice; nearest: v5p:4x4x4"),
        ("v5p:2x2x8", "'v5p:2x2x8' is no v5p slice; nearest: v5p:2x2x4"),
        ("v4:16x16x20", "'v4:16x16x20' is 5120 chips; a v4 slice has at most 4096; nearest: v4:16x16x16"),
        ("v5p:99999999x4x4", "a v5p slice has at most 8960"),
        ("v5q:4x4x4", "'v5q' is not a chip known here; did you mean 'v5p'?"),
        ("h10:2x8", "did you mean 'h100'?"),
        ("v5p-128", "'v5p-128' counts cores and hides the shape; write the shape in chips, as in v5p:4x4x4"),
        ("v5e-256", "'v5e-256' counts chips and hides the shape; write the shape in chips, as in v5e:16x16"),
        ("v5p", "'v5p' names a chip but no shape; write for example v5p:2x4x4"),
        ("v5p 4 by 4", "is not a topology; write [slices*]chip:shape, for example cpu:8"),
        ("", "is not a topology"),
        ("cpu:0", "'cpu:0' has a size of 0; sizes start at 1, as in cpu:8"),
        ("0*v5e:4x4", "has a size of 0"),
        (
            "2*h100:4x8",
            "only TPU topologies have slices; h100 takes hosts x devices of a host, as in h100:4x8",
        ),
        ("h100:2x2x2", "'h100:2x2x2' has 3 sizes, but h100 takes hosts x devices of a host"),
        ("h100:128", "puts 128 devices on a host, but h100 has at most 8; 128 devices are h100:16x8"),
        ("gb200:2x72", "puts 72 devices on a host, but gb200 has at most 4; 144 devices are gb200:36x4"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Topology.parse(text)


@pytest.mark.devices(8)
def test_attached_devices():
    local = Topology.local()
    assert str(local) == "cpu:8"
    assert local.devices() == jax.devices()
    assert Topology.parse("cpu:4").devices() == jax.devices()[:4]
    with pytest.raises(UserError, match="v5p:4x4x8 is 128 v5p devices on 32 hosts, but cpu:8 is attached"):
        Topology.parse("v5p:4x4x8").devices()
    with pytest.raises(
        UserError, match=r"cpu:16 is 16 .* cpu:8 is attached; set JAX_NUM_CPU_DEVICES=16 before"
    ):
        Topology.parse("cpu:16").devices()
    with pytest.raises(UserError, match="cpu:2x4 is 8 cpu devices on 2 hosts, but cpu:8 is attached"):
        Topology.parse("cpu:2x4").devices()


def gpu(index, process, kind="NVIDIA H100 80GB HBM3", machine=None):
    return SimpleNamespace(
        id=index, process_index=process, device_kind=kind, platform="gpu", slice_index=machine
    )


def tpu(index, coords, core=0, kind="TPU v5", process=0, slice_index=None):
    return SimpleNamespace(
        id=index, coords=coords, core_on_chip=core, device_kind=kind, platform="tpu", process_index=process,
        slice_index=slice_index,
    )  # fmt: skip


def test_topology_of_devices():
    assert str(Topology.of([gpu(i, i // 8) for i in range(16)])) == "h100:2x8"
    # One process for each GPU, as Slurm and MPI often start them.
    assert str(Topology.of([gpu(i, i, machine=i // 8) for i in range(16)])) == "h100:2x8"
    rack = [gpu(i, i // 4, kind="NVIDIA GB200", machine=i // 72) for i in range(144)]
    assert str(Topology.of(rack)) == "gb200:36x4"
    cube = [tpu(i, (i % 2, i // 2 % 2, i // 4), process=i // 4) for i in range(8)]
    assert str(Topology.of(cube)) == "v5p:2x2x2"
    pair = [tpu(i, (i // 2, 0, 0), core=i % 2, kind="TPU7x") for i in range(4)]
    assert (Topology.of(pair).shape, Topology.of(pair).num_devices) == ((2, 1, 1), 4)
    slices = [
        tpu(i, (i % 2, i // 2 % 2, 0), kind="TPU v5 lite", process=i // 4, slice_index=i // 4)
        for i in range(8)
    ]
    assert str(Topology.of(slices)) == "2*v5e:2x2"
    one_host_each = [tpu(i, (i % 4, i // 4, 0), kind="TPU v6 lite", process=i // 8) for i in range(16)]
    assert Topology.of(one_host_each).num_hosts == 2


def test_devices_that_form_no_topology():
    with pytest.raises(UserError, match=r"unequal numbers of h100 devices \(8, 4\) .* use 4 on each"):
        Topology.of([gpu(i, i // 8) for i in range(12)])
    with pytest.raises(UserError, match="several kinds"):
        Topology.of([gpu(0, 0), gpu(1, 0, kind="NVIDIA H200")])
    with pytest.raises(UserError, match="3 v5p chips do not fill the 2x2x1 box they span"):
        Topology.of([tpu(i, (i % 2, i // 2, 0)) for i in range(3)])
    with pytest.raises(
        UserError, match="v4 chips, which have 1 each; describe them with chip_config_name='megacore'"
    ):
        Topology.of([tpu(i, (i // 2, 0, 0), core=i % 2, kind="TPU v4") for i in range(4)])
    with pytest.raises(UserError, match="no devices"):
        Topology.of([])


def test_a_device_that_is_not_listed_has_no_figures():
    topology = Topology.of([gpu(i, 0, kind="NVIDIA GeForce RTX 4090") for i in range(2)])
    assert str(topology) == "nvidia-geforce-rtx-4090:2"
    assert topology.chip.peak_bf16_flops is None


def test_compiler_arguments():
    assert Topology.parse("2*v5e:8x16").compiler_arguments() == {
        "topology_name": "v5e:8x16",
        "platform": "tpu",
        "wrap": (False, True, False),
        "chips_per_host_bounds": (2, 2, 1),
        "num_slices": 2,
    }
    assert Topology.parse("v4:4x4x4").compiler_arguments()["chip_config_name"] == "megacore"
    with pytest.raises(UserError, match="h100:2x8 has no TPU compiler"):
        Topology.parse("h100:2x8").compiler_arguments()


def test_every_listed_chip_has_what_a_planner_needs():
    needed = (
        "peak_bf16_flops",
        "peak_f32_flops",
        "hbm_bytes",
        "hbm_bytes_per_second",
        "link_bytes_per_second",
        "links_per_chip",
        "dcn_bytes_per_second_per_chip",
        "sources",
    )
    for chip in chips().values():
        assert all(getattr(chip, name) for name in needed), chip.name
        assert chip.nominal == (chip.platform == "cpu")
        assert all(chip_of_device_kind(kind, chip.platform) is chip for kind in chip.device_kinds)
        assert all(chip_named(alias) is chip for alias in chip.aliases)
    listed = {
        "v4",
        "v5e",
        "v5p",
        "v6e",
        "tpu7x",
        "a100",
        "a100-40gb",
        "h100",
        "h200",
        "b200",
        "gb200",
        "mi300x",
        "cpu",
    }
    assert set(chips()) == listed


def test_figures_are_of_a_device():
    chip = chip_named("tpu7x")
    assert chip.peak_flops("bfloat16") * chip.devices_per_chip == 2307e12
    assert chip_named("h100").peak_flops("float8_e4m3fn") == 1979e12
    assert chip_named("v5e").peak_flops("float8_e4m3fn") is None
    assert chip_named("h100").fabric_bytes_per_second_per_chip == 450e9


def test_parsing_needs_no_jax():
    code = (
        "import sys; from meshwright.sharding import Topology; "
        "Topology.parse('v5p:4x4x8'); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
