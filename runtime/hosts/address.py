"""Addresses at which the processes of a run meet: `host:port`, and a free port of this machine."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from ...sharding.errors import UserError

LOOPBACK = "127.0.0.1"


def split_address(coordinator: str) -> tuple[str, int]:
    """Take `host:port` apart, brackets around an IPv6 host removed; UserError for anything else."""
    host, colon, port = coordinator.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"coordinator={coordinator!r} is not host:port with a port from 1 to 65535")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Tell whether `host` names this machine only."""
    return host in ("localhost", "::1") or host.startswith("127.")


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a free TCP port of the loopback interface that nobody else is handed while the block runs.

    A coordinator that listens with SO_REUSEPORT, as JAX's does, may bind it all the same.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as keeper:
        if hasattr(socket, "SO_REUSEPORT"):
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind((LOOPBACK, 0))
        port = keeper.getsockname()[1]
        if not hasattr(socket, "SO_REUSEPORT"):
            keeper.close()
        yield port
