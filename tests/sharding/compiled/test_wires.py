"""Seconds of collectives over the links that their groups and algorithms reach, against counts by hand."""

import pytest
from meshwright.sharding import Topology
from meshwright.sharding.compiled.wires import ASSUMED, Algorithm, Fabric, algorithm, wire_bytes
from meshwright.sharding.cost.calibration import Calibration
from meshwright.sharding.hlo.replica_groups import axes_of_groups
from meshwright.sharding.hlo.text import parse_hlo

MIB = 2.0**20
PLAIN = Calibration()


def _groups(mesh, *axes):
    """Return the groups of devices, numbered in mesh order, that differ along `axes` only."""
    import numpy as np

    names = list(mesh)
    numbers = np.arange(int(np.prod(list(mesh.values())))).reshape(list(mesh.values()))
    order = [names.index(name) for name in names if name not in axes] + [names.index(name) for name in axes]
    size = int(np.prod([mesh[axis] for axis in axes]))
    found = tuple(tuple(int(n) for n in row) for row in numbers.transpose(order).reshape(-1, size))
    assert set(axes_of_groups(found, mesh).names) == {axis for axis in axes if mesh[axis] > 1}
    return found


def _seconds(topology, mesh, axes, kind="all_gather", named=ASSUMED, whole=64 * MIB):
    fabric = Fabric(Topology.parse(topology), mesh, PLAIN)
    return fabric.seconds(kind, _groups(mesh, *axes), named, whole)


def test_a_closed_ring_goes_both_ways_and_an_open_one_as_fast_as_its_middle_link():
    one = 90e9  # a v5p link, one way
    assert _seconds("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, ["tensor"]) == pytest.approx(
        64 * MIB * 3 / 4 / (2 * one)
    )
    assert _seconds("v5e:4x4", {"fsdp": 4, "tensor": 4}, ["tensor"]) == pytest.approx(
        64 * MIB * 3 / 4 / (one / 2)  # a v5e link is half as fast
    )


def test_an_algorithm_drives_no_more_links_than_it_says():
    mesh = {"fsdp": 128}
    whole = [
        _seconds("v5p:4x4x8", mesh, ["fsdp"], named=Algorithm(name="", drives=n)) for n in (2, 4, 6, None)
    ]
    ideal = 64 * MIB * 127 / 128 / 90e9
    assert whole == pytest.approx([ideal / 2, ideal / 4, ideal / 6, ideal / 6])


def test_one_ring_goes_through_a_group_that_has_a_part_of_an_axis_beside_others():
    """So libtpu has it, as the test of quick proofs shows by compiling; it names it late."""
    ring = Algorithm(name="", drives=2)
    for topology, mesh in (
        ("v6e:16x16", {"fsdp": 64, "tensor": 4}),
        ("v6e:16x16", {"data": 4, "fsdp": 64}),
        ("v5p:8x8x8", {"fsdp": 128, "tensor": 4}),
    ):
        for kind in ("all_gather", "reduce_scatter"):
            assumed, named = (_seconds(topology, mesh, ["fsdp"], kind, one) for one in (ASSUMED, ring))
            assert assumed == named
        assumed, named = (_seconds(topology, mesh, ["fsdp"], "all_reduce", one) for one in (ASSUMED, ring))
        assert assumed < named
    apart = {"fsdp": 32, "tensor": 4}
    assert _seconds("v5p:4x4x8", apart, ["fsdp"]) < _seconds("v5p:4x4x8", apart, ["fsdp"], named=ring)


def test_an_all_reduce_sends_twice_what_an_all_gather_does():
    mesh = {"data": 2, "fsdp": 8}
    gather, reduce = (_seconds("v5e:4x4", mesh, ["fsdp"], kind=kind) for kind in ("all_gather", "all_reduce"))
    assert reduce == pytest.approx(2 * gather)


def test_cores_of_a_chip_in_different_groups_share_its_links():
    # A chip of tpu7x is two devices: over all 8 of four chips, or as two groups of 4 with one core of each.
    together = _seconds("tpu7x:2x2x1", {"fsdp": 8}, ["fsdp"])
    apart = _seconds("tpu7x:2x2x1", {"fsdp": 4, "tensor": 2}, ["fsdp"])
    assert together == pytest.approx(64 * MIB * 7 / 8 / 200e9)
    assert apart == pytest.approx(64 * MIB * 3 / 4 / 100e9)


def test_an_all_to_all_is_as_slow_as_the_middle_of_its_longest_ring():
    local, one = 64 * MIB, 45e9
    assert _seconds("v5e:16x16", {"fsdp": 16, "tensor": 16}, ["tensor"], kind="all_to_all") == pytest.approx(
        local * 16 / 8 / one
    )
    assert _seconds("v5e:4x4", {"fsdp": 4, "tensor": 4}, ["tensor"], kind="all_to_all") == pytest.approx(
        local * 4 / 4 / one
    )


def test_a_permute_takes_as_long_as_its_fullest_link():
    mesh = {"fsdp": 16, "tensor": 4}
    fabric = Fabric(Topology.parse("v5p:4x4x4"), mesh, PLAIN)
    ring = [[(r[i], r[(i + 1) % 4]) for i in range(4)] for r in _groups(mesh, "tensor")]
    across = [[(r[i], r[(i + 2) % 4]) for i in range(4)] for r in _groups(mesh, "tensor")]
    still = [[(d, d)] for d in range(64)]
    next_, far, none = (
        fabric.seconds("collective_permute", tuple(p for row in pairs for p in row), ASSUMED, 90e6)
        for pairs in (ring, across, still)
    )
    assert (next_, far, none) == pytest.approx((1e-3, 2e-3, 0.0))


def test_a_permute_leaves_the_other_direction_of_its_links_free():
    mesh = {"fsdp": 16, "tensor": 4}
    fabric = Fabric(Topology.parse("v5p:4x4x4"), mesh, PLAIN)
    rings = _groups(mesh, "tensor")
    on, back = (
        fabric.resources(
            "collective_permute", tuple((ring[n], ring[(n + by) % 4]) for ring in rings for n in range(4))
        )
        for by in (1, -1)
    )
    assert len(on) == len(back) == 1
    assert not on & back
    assert fabric.resources("all_gather", rings) == on | back


def test_between_slices_and_hosts_the_network_tells():
    v5e = _seconds("2*v5e:4x4", {"data": 2, "fsdp": 16}, ["data"], kind="all_reduce")
    assert v5e == pytest.approx(64 * MIB / 3.125e9)
    # Eight adapters of a host carry a ring that enters and leaves it: 16 devices, 8 a host.
    assert _seconds("h100:2x8", {"fsdp": 16}, ["fsdp"]) == pytest.approx(64 * MIB * 15 / 16 / 400e9)
    fabric = Fabric(Topology.parse("h100:2x8"), {"fsdp": 16}, PLAIN)
    turned = tuple((d, (d + 1) % 16) for d in range(16))
    assert fabric.seconds("collective_permute", turned, ASSUMED, 50e6) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("all_gather", 3 / 4),
        ("all_reduce", 3 / 2),
        ("reduce_scatter", 3 / 4),
        ("all_to_all", 3 / 4),
        ("collective_permute", 1),
    ],
)
def test_what_a_device_sends(kind, share):
    assert wire_bytes(kind, 4, 1000.0) == 1000 * share
    assert wire_bytes(kind, 1, 1000.0) == 0.0


NAMED = """HloModule f, is_scheduled=true

ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%a), replica_groups={{}}, to_apply=%add, backend_config={{{config}}}
}}
"""


@pytest.mark.parametrize(
    ("config", "name", "drives"),
    [
        (
            '"collective_algorithm_config":{"emitter":"RotatedPincerEmitter","strategy":"StrategyND",'
            '"debug":"\\nStrategyND{colors:3 phases:3 dim_used:{0 1 2},{1 2 0},{2 0 1} use_ndnway:0}"}',
            "RotatedPincerEmitter/StrategyND colors:3",
            6,
        ),
        (
            '"collective_algorithm_config":{"emitter":"RotatedPincerEmitter","strategy":'
            '"UniDirectionNDRingStrategy","debug":"\\nUniDirectionNDRingStrategy{colors:4 phases:2}"}',
            "RotatedPincerEmitter/UniDirectionNDRingStrategy colors:4",
            4,
        ),
        (
            '"collective_algorithm_config":{"emitter":"1DAllGatherNonMajorDim","debug":"\\ngroup_size = 4"}',
            "1DAllGatherNonMajorDim",
            2,
        ),
        (
            '"ici_strategy_config":{"color_strategies":[{"phase_rings":[{"ring_type":"ICI_RING_TYPE_UNIDIR_CW"}]},'
            '{"phase_rings":[{"ring_type":"ICI_RING_TYPE_UNIDIR_CCW"}]}]}',
            "SparseCore offload colors:2",
            2,
        ),
        ('"collective_backend_config":{"is_sync":true,"backend":"DEFAULT"}', "NCCL ring (assumed)", None),
        ('"kernel_strategy":"KERNEL_STRATEGY_TRITON_ONE_SHOT"', "triton one shot", None),
        ("", "ring (assumed)", None),
    ],
)
def test_algorithms_are_read_as_compilers_name_them(config, name, drives):
    found = algorithm(parse_hlo(NAMED.format(config=config)).instructions["r"])
    assert (found.name, found.drives) == (name, drives)
