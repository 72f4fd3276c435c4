"""Seconds of collectives worked out by hand."""

import pytest
from meshwright.sharding import Topology
from meshwright.sharding.cost.calibration import Calibration
from meshwright.sharding.cost.collectives import joint_link, links

PERFECT = Calibration()


def test_all_gather_on_a_ring_with_wraparound_uses_both_directions():
    # v5p:4x4x4 wraps; an axis of 4 is one torus ring of 90 GB/s links, two ways.
    link = links({"data": 16, "tensor": 4}, Topology.parse("v5p:4x4x4"), PERFECT)["tensor"]
    assert link.collective("all_gather", 1e9) == pytest.approx(0.75 * 1e9 / 180e9)


def test_all_gather_on_a_line_has_one_way_only():
    # An axis of v5e wraps only when it has 16 chips: here are four in a row.
    topology = Topology.parse("v5e:4x4")
    link = links({"data": 4, "tensor": 4}, topology, PERFECT)["tensor"]
    assert link.collective("all_gather", 1e9) == pytest.approx(0.75 * 1e9 / 45e9)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    link = links({"fsdp": 8}, Topology.parse("mi300x:8"), PERFECT)["fsdp"]
    both = link.collective("reduce_scatter", 1e9) + link.collective("all_gather", 1e9)
    assert link.collective("all_reduce", 1e9) == pytest.approx(both)
    assert both == pytest.approx(2 * 7 / 8 * 1e9 / 448e9)


def test_a_group_over_hosts_shares_the_adapters_of_its_members():
    topology = Topology.parse("h100:4x8")
    whole = links({"fsdp": 32}, topology, PERFECT)["fsdp"]
    thin = links({"fsdp": 4, "tensor": 8}, topology, PERFECT)["fsdp"]
    assert whole.bytes_per_second == pytest.approx(8 * 50e9)
    assert thin.bytes_per_second == pytest.approx(50e9)
    assert thin.network


def test_slices_talk_over_the_data_centre_network():
    topology = Topology.parse("2*v5e:4x4")
    found = links({"data": 2, "fsdp": 16}, topology, PERFECT)
    assert found["data"].bytes_per_second == pytest.approx(topology.chip.dcn_bytes_per_second_per_chip)
    assert not found["fsdp"].network


def test_starts_are_counted_for_each_collective():
    slow = Calibration(fabric_seconds=1e-5)
    link = links({"fsdp": 8}, Topology.parse("mi300x:8"), slow)["fsdp"]
    extra = link.collective("all_gather", 1e9, 10) - link.collective("all_gather", 1e9, 0)
    assert extra == pytest.approx(10 * 7 * 1e-5)


def test_a_group_over_two_axes_is_one_of_all_their_devices():
    topology = Topology.parse("h100:256x8")
    mesh = {"fsdp": 16, "expert": 128}
    both = joint_link(mesh, topology, PERFECT, ("fsdp", "expert"))
    assert both == links({"fsdp": 2048}, topology, PERFECT)["fsdp"]
    # The slower axis by itself has one adapter for each device.
    assert both.bytes_per_second == 8 * links(mesh, topology, PERFECT)["fsdp"].bytes_per_second
