"""The ways of NCCL: which one is fastest for a size, and how many devices and hosts it visits."""

import numpy as np
import pytest
from meshwright.sharding import Topology
from meshwright.sharding.cost.calibration import calibration_for
from meshwright.sharding.cost.collectives import Link, links

# An all-reduce of 8 H100: bytes, microseconds (github NVIDIA/dgxc-benchmarking nccl/README.md).
MEASURED = ((2**10, 16.94), (2**20, 27.37), (2**22, 54.19), (2**24, 123.8), (2**26, 324.7), (2**30, 4029.4))


def link(mesh: dict[str, int], topology: str) -> Link:
    (found,) = links(mesh, Topology.parse(topology), calibration_for("h100")).values()
    return found


@pytest.mark.parametrize(("size", "microseconds"), MEASURED)
def test_an_all_reduce_within_a_host_takes_what_was_measured(size: int, microseconds: float) -> None:
    found = link({"data": 8}, "h100:8").collective("all_reduce", size)
    assert found * 1e6 == pytest.approx(microseconds, rel=0.15)


def test_a_small_all_reduce_over_many_hosts_goes_by_tree() -> None:
    """A ring of 256 hosts visits 510 borders, each of at least 2.7 us; a tree goes up and down eight."""
    many = link({"data": 2048}, "h100:256x8")
    assert many.collective("all_reduce", 2**10) < 2 * 8 * 14e-6 + 100e-6
    assert many.collective("all_gather", 2**10) > 255 * 2.7e-6


def test_a_large_all_reduce_over_hosts_goes_by_ring_at_the_rate_of_all_adapters() -> None:
    size, record = 2**34, calibration_for("h100")
    moved = 2 * 31 / 32 * size
    rate = min(record.fabric_efficiency * 450e9, record.network_efficiency * 8 * 50e9)
    assert link({"data": 32}, "h100:4x8").collective("all_reduce", size) == pytest.approx(
        moved / rate, rel=0.01
    )


def test_two_sums_together_cost_less_than_two() -> None:
    found = link({"data": 8}, "h100:8")
    assert found.collective("all_reduce", 2**20) < 0.8 * found.collective("all_reduce", 2**20, 2)
    assert found.collective("all_reduce", 2**21, 2) == pytest.approx(
        2 * found.collective("all_reduce", 2**20)
    )


def test_arrays_of_sizes_take_what_each_takes() -> None:
    found = link({"data": 8}, "h100:8")
    sizes, counts = np.array([2.0**12, 0.0, 2.0**28]), np.array([3.0, 0.0, 1.0])
    each = [found.transfer("all_reduce", size, count) for size, count in zip(sizes, counts, strict=True)]
    assert found.transfer("all_reduce", sizes, counts) == pytest.approx(each)
