"""What the child says of a compiled step's memory."""

from types import SimpleNamespace

import pytest
from meshwright.sharding import Topology
from meshwright.sharding.verify.worker import peak_of


def sizes(*, peak: float, host: float) -> SimpleNamespace:
    return SimpleNamespace(
        argument_size_in_bytes=1000,
        temp_size_in_bytes=6000,
        output_size_in_bytes=900,
        alias_size_in_bytes=900,
        generated_code_size_in_bytes=10,
        host_temp_size_in_bytes=host,
        host_argument_size_in_bytes=0,
        host_output_size_in_bytes=0,
        peak_memory_in_bytes=peak,
    )


@pytest.mark.parametrize(
    ("topology", "peak", "host", "expected"),
    [
        ("v5e:4x4", 5000, 0, 5000),
        ("v5e:4x4", 5000, 2000, 5000),
        # Arguments and what lies on the host: of the device nothing is stated.
        ("v5e:4x4", 9000, 8000, None),
        # As much as lies on the host, and more than the device has arguments and temporaries.
        ("v5e:4x4", 7990, 8000, None),
        ("h100:8", 15000, 8000, 7000),
    ],
)
def test_the_stated_peak_is_of_the_device_or_none(topology, peak, host, expected):
    assert peak_of(sizes(peak=peak, host=host), Topology.parse(topology)) == expected
