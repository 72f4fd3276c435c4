"""Settings of the processes of a run that contradict themselves."""

from __future__ import annotations

import pytest
from meshwright.runtime.config import parse
from meshwright.sharding.errors import UserError


@pytest.mark.parametrize(
    ("hosts", "sentence"),
    [
        ({"process_id": 1}, "process_id=1 needs num_processes too"),
        ({"process_id": 2, "num_processes": 2}, "process_id=2 is not below num_processes=2; the last is 1"),
        ({"coordinator": "node1"}, "coordinator"),
        ({"coordinator": "node1:99999"}, "no port between 1 and 65535"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"num_proceses": 2}, "num_processes"),
    ],
)
def test_contradictions_are_one_sentence(hosts: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        parse({"hosts": hosts})
    assert "\n" not in str(caught.value)


def test_addresses_that_are_taken() -> None:
    for address in ("node1:1234", "10.0.0.1:80", "[::1]:8476"):
        assert parse({"hosts": {"coordinator": address}}).hosts.coordinator == address
