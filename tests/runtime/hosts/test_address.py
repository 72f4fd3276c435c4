"""Addresses at which processes meet."""

from __future__ import annotations

import socket

import pytest
from meshwright.runtime.hosts.address import LOOPBACK, is_loopback, reserved_port, split_address
from meshwright.sharding.errors import UserError


def test_an_address_is_host_and_port() -> None:
    assert split_address("node1:1234") == ("node1", 1234)
    assert split_address("[::1]:80") == ("::1", 80)
    assert [is_loopback(host) for host in ("::1", "localhost", "127.0.0.9", "node1")] == [True] * 3 + [False]


@pytest.mark.parametrize("address", ["node1", "node1:", ":1234", "node1:0", "node1:70000", "node1:http"])
def test_malformed_address(address: str) -> None:
    with pytest.raises(UserError, match="is not host:port"):
        split_address(address)


def test_a_reserved_port_is_one_process_groups_and_can_be_listened_at() -> None:
    with reserved_port() as port, reserved_port() as other:
        assert port != other
        with pytest.raises(OSError, match="in use"), socket.create_server((LOOPBACK, port)):
            pass
        with socket.create_server((LOOPBACK, port), reuse_port=True):
            pass
