"""Device groups in every way XLA writes them, and the mesh axes they stand for."""

import pytest
from meshwright.sharding.hlo.replica_groups import (
    axes_of_groups,
    axes_of_pairs,
    parse_pairs,
    parse_replica_groups,
)

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, use_global_device_ids=true", ((0, 1), (2, 3))),
        ("{ {0, 4}, {1, 5} }", ((0, 4), (1, 5))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[4,2]<=[8], dimensions={0}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['data'=4,'fsdp'=2] {'fsdp'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['data'=2,'fsdp'=4] {'data'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=1,'b'=2,'c'=1,'d'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", ((0, 2), (1, 3))),
        ("mesh['x'=8] {'x':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=8] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['x'=8] {'x':(4)2,'x':(1)2}", ((0, 4, 1, 5), (2, 6, 3, 7))),
        ("mesh['x'=2,'y'=4] {'x','y':(2)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_every_form_of_groups_is_read(text, groups):
    assert parse_replica_groups(text, num_devices=8) == groups


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="no known form: 'tiles"):
        parse_replica_groups("tiles(2)", num_devices=8)


@pytest.mark.parametrize(
    ("groups", "label"),
    [
        (((0, 1), (2, 3), (4, 5), (6, 7)), "tensor"),
        (((0, 2), (1, 3), (4, 6), (5, 7)), "fsdp"),
        (((0, 4), (1, 5), (2, 6), (3, 7)), "data"),
        (((4, 0, 2, 6), (1, 3, 5, 7)), "data×fsdp"),
        (((0, 1, 4, 5), (2, 3, 6, 7)), "data×tensor"),
        ((tuple(range(8)),), "data×fsdp×tensor"),
        (tuple((k,) for k in range(8)), "none"),
        (((0, 1), (2, 3)), "part of tensor"),
        (((0, 3), (1, 2), (4, 7), (5, 6)), "part of fsdp×tensor"),
    ],
)
def test_groups_name_exactly_the_axes_that_vary_within_them(groups, label):
    assert axes_of_groups(groups, MESH).label == label


def test_a_group_over_half_of_an_axis_is_a_part_of_it():
    assert axes_of_groups(((0, 1), (2, 3)), {"fsdp": 4}).label == "part of fsdp"


def test_an_axis_of_one_device_never_counts():
    assert axes_of_groups(((0, 1), (2, 3)), {"stage": 1, "data": 2, "context": 1, "fsdp": 2}).label == "fsdp"


def test_a_permute_runs_along_the_axes_its_pairs_cross():
    ring = parse_pairs("{{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}, metadata={}")
    assert axes_of_pairs(ring, MESH).label == "fsdp"
    assert axes_of_pairs(parse_pairs("{{0,0},{1,1}}"), MESH).label == "none"


def test_a_mesh_too_small_for_the_groups_is_an_error():
    with pytest.raises(ValueError, match="device 7 lies outside a mesh of 4 devices"):
        axes_of_groups(((0, 7),), {"data": 4})
