from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from meshwright.sharding import Topology, UserError, make_mesh
from meshwright.sharding.hardware.arrange import arrange
from meshwright.sharding.hardware.attached import by_position
from meshwright.sharding.hardware.axes import resolve_axes
from meshwright.sharding.hardware.links import describe, reaches

EVERY_KIND = [
    ("cpu:2x4", {"data": 2, "tensor": 4}),
    ("h100:16x8", {"tensor": 8, "data": -1}),
    ("gb200:36x4", {"data": 2, "fsdp": 9, "tensor": 8}),
    ("v5e:2x4", {"fsdp": 8}),
    ("v5p:4x4x8", {"fsdp": 32, "tensor": 4}),
    ("v5p:4x4x8", {"tensor": 2, "data": 4, "fsdp": 16}),
    ("2*v5e:16x16", {"data": 2, "fsdp": 64, "tensor": 4}),
    ("3*v4:4x4x4", {"stage": 3, "fsdp": 16, "context": 4}),
    ("tpu7x:4x4x4", {"fsdp": 16, "tensor": 8}),
    ("tpu7x:4x4x4", {"data": 2, "fsdp": 64}),
]


@pytest.mark.parametrize(("text", "axes"), EVERY_KIND)
def test_every_device_stands_in_one_place(text, axes):
    topology = Topology.parse(text)
    laid = arrange(axes, topology)
    assert laid.shape == tuple(resolve_axes(axes, topology.num_devices).values())
    assert sorted(laid.ravel()) == list(range(topology.num_devices))


def hops(laid, axis, topology):
    """The longest way between logical neighbours along `axis`, in links, inside one slice."""
    shape, cores = np.array(topology.shape), topology.chip.devices_per_chip
    chip = laid % topology.devices_per_slice // cores
    where = np.stack(np.unravel_index(chip, topology.shape))
    step = np.abs(np.diff(where, axis=axis + 1))
    around = np.where(np.array(topology.wrap), shape, 10**6).reshape(-1, *[1] * laid.ndim)
    return int(np.minimum(step, around - step).sum(axis=0).max())


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("v5p:4x4x8", {"context": 32, "tensor": 4}),
        ("v5p:4x4x8", {"data": 4, "fsdp": 8, "tensor": 4}),
        ("v5e:16x16", {"context": 256}),
        ("v5e:2x4", {"data": 2, "tensor": 4}),
        ("v5e:4x4", {"context": 16}),
        ("tpu7x:4x4x4", {"stage": 16, "tensor": 8}),
        ("tpu7x:2x2x1", {"context": 8}),
        ("v4:4x8x8", {"stage": 64, "tensor": 4}),
        ("v5p:12x12x12", {"stage": 1728}),
    ],
)
def test_neighbours_on_a_torus_are_one_hop_apart(text, axes):
    topology = Topology.parse(text)
    laid = arrange(axes, topology)
    assert [hops(laid, axis, topology) for axis in range(laid.ndim)] == [1] * laid.ndim


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("v5p:4x4x8", {"fsdp": 128}),
        ("v5p:4x4x8", {"fsdp": 32, "tensor": 4}),
        ("v5e:16x16", {"data": 256}),
        ("v4:4x4x4", {"data": 4, "tensor": 16}),
    ],
)
def test_an_axis_that_gathers_counts_through_torus_axes_like_digits(text, axes):
    topology = Topology.parse(text)
    laid = arrange(axes, topology)
    where = np.stack(np.unravel_index(laid, topology.shape))
    for axis in range(laid.ndim):
        line = np.moveaxis(where, axis + 1, 1).reshape(len(where), laid.shape[axis], -1)[:, :, 0]
        spanned = [row for row in line if len(set(row)) > 1]
        # The digit that first changes last is the major one.
        spanned.sort(key=lambda row: int((row != row[0]).argmax()), reverse=True)
        count = list(zip(*spanned, strict=True))
        assert count == sorted(count)


def test_a_ring_over_a_small_slice_closes():
    topology = Topology.parse("v5e:2x4")
    ring = arrange({"context": 8}, topology)
    assert hops(np.array([ring[-1], ring[0]]), 0, topology) == 1


def test_the_heaviest_axis_gets_the_fastest_links():
    reach = reaches({"data": 16, "tensor": 8}, Topology.parse("h100:16x8"))
    assert (reach["tensor"].link, reach["data"].link) == ("fabric", "network")
    reach = reaches({"tensor": 8, "data": 16}, Topology.parse("h100:16x8"))
    assert (reach["tensor"].link, reach["data"].link) == ("fabric", "network")
    reach = reaches({"data": 2, "fsdp": 9, "tensor": 8}, Topology.parse("gb200:36x4"))
    assert [reach[axis].domains for axis in ("data", "fsdp", "tensor")] == [True, False, False]
    assert reach["tensor"].hosts
    reach = reaches({"tensor": 2, "fsdp": 64}, Topology.parse("tpu7x:4x4x4"))
    assert (reach["tensor"].link, reach["fsdp"].link) == ("chip", "fabric")


def test_slices_split_the_lightest_axis():
    reach = reaches({"fsdp": 128, "data": 4, "tensor": 4}, Topology.parse("8*v5e:16x16"))
    assert [reach[axis].slices for axis in ("data", "fsdp", "tensor")] == [True, True, False]
    reach = reaches({"stage": 2, "fsdp": 256}, Topology.parse("2*v5e:16x16"))
    assert (reach["stage"].slices, reach["fsdp"].slices) == (True, False)
    assert reach["fsdp"].extent == (16, 16)
    assert reach["fsdp"].whole == (True, True)


def test_which_axes_cross_hosts():
    reach = reaches({"data": 1, "fsdp": 32, "tensor": 4}, Topology.parse("v5p:4x4x8"))
    assert (reach["data"].link, reach["fsdp"].extent, reach["tensor"].extent) == (
        "none",
        (1, 4, 8),
        (4, 1, 1),
    )
    assert reach["fsdp"].hosts
    assert not reaches({"tensor": 4}, Topology.parse("v5p:2x2x1"))["tensor"].hosts
    # Eight GPUs a host: groups of six cannot all stay inside one.
    assert reaches({"data": 4, "tensor": 6}, Topology.parse("h100:3x8"))["tensor"].hosts


def test_describe():
    assert describe({"data": 2, "fsdp": 32, "tensor": 4, "stage": 1}, Topology.parse("2*v5p:4x4x8")) == (
        "data=2: data-centre network, across slices\nfsdp=32: ICI 1x4x8\ntensor=4: ICI 4x1x1"
    )
    assert describe({"data": 2, "tensor": 8}, Topology.parse("h100:2x8")) == (
        "data=2: data-centre network, across hosts\ntensor=8: NVLink"
    )


@pytest.mark.devices(8)
def test_mesh_over_simulated_devices():
    mesh = make_mesh({"data": 2, "fsdp": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert [device.id for device in mesh.devices.ravel()] == [device.id for device in jax.devices()]
    other_order = make_mesh({"tensor": 2, "data": 4}, Topology.parse("cpu:8"))
    assert [device.id for device in other_order.devices[:, 0]] == [0, 1]
    assert make_mesh({"data": -1}, "cpu:4").size == 4
    assert make_mesh({"data": -1}, devices=jax.devices()[2:4]).devices[0].id == 2


@pytest.mark.devices(8)
def test_mesh_over_other_devices_than_asked():
    with pytest.raises(UserError, match="the devices given are cpu:8, not v5p:4x4x8"):
        make_mesh({"data": -1}, "v5p:4x4x8", devices=jax.devices())
    with pytest.raises(UserError, match="tensor=3 does not divide 8 devices; nearest: tensor=2 or 4"):
        make_mesh({"data": -1, "tensor": 3})


def test_real_devices_are_found_by_what_they_say_of_themselves():
    def device(index, process, machine):
        return SimpleNamespace(id=index, process_index=process, slice_index=machine, platform="gpu",
                               device_kind="NVIDIA H100 80GB HBM3")  # fmt: skip

    # Ranks handed out round-robin: consecutive ids lie on different machines.
    scattered = [device(i, i, i % 2) for i in range(16)]
    topology = Topology.of(scattered)
    laid = by_position(scattered, topology.chip)[arrange({"data": 2, "tensor": 8}, topology)]
    assert {member.slice_index for member in laid[0]} == {0}
    assert {member.slice_index for member in laid[1]} == {1}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fdsp": 4}, "mesh axis 'fdsp' is not known; did you mean 'fsdp'?"),
        ({"model": 4}, "mesh axis 'model' is not known; known: data, fsdp, tensor, context, expert, stage"),
        ({"data": -1, "fsdp": -1}, "data=-1 and fsdp=-1: only one axis can absorb the rest"),
        ({"data": 3, "tensor": 4}, "data=3 x tensor=4 is 12, but there are 8 devices; nearest: data=2"),
        ({"data": 4}, "data=4, but there are 8 devices; nearest: data=8, or -1"),
        (
            {"fsdp": -1, "tensor": 3},
            "fsdp=-1 cannot absorb the rest: tensor=3 does not divide 8 devices; nearest: tensor=2 or 4",
        ),
        ({"fsdp": -1, "tensor": 16}, "tensor=16 does not divide 8 devices; nearest: tensor=8"),
        ({"data": 0}, "data=0 is no axis size; write a whole number from 1, or -1 for the rest"),
        ({"data": 2.0}, "data=2.0 is no axis size"),
        ({}, "a mesh needs an axis; write for example data=-1 for all 8 devices"),
    ],
)  # fmt: skip
def test_mistakes(axes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_axes(axes, 8)


@pytest.mark.processes(2, devices=2)
def test_processes_are_hosts():
    assert str(Topology.local()) == "cpu:2x2"
    mesh = make_mesh({"tensor": 2, "data": -1}, "cpu:2x2")
    rows = [{device.process_index for device in mesh.devices[:, group]} for group in range(2)]
    assert rows == [{0}, {1}]
    assert make_mesh({"data": -1}, "cpu:4").size == 4
    with pytest.raises(UserError, match="cpu:4x1 is 4 cpu devices on 4 hosts, but cpu:2x2 is attached"):
        make_mesh({"data": -1}, "cpu:4x1")
