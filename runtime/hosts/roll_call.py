"""Every process of a run says that it is there before JAX starts, because JAX aborts whoever waits in vain.

Process 0 listens on the coordinator's port, which JAX takes over afterwards; the others connect and send one
line of JSON about themselves; process 0 answers each with the list of all, or with what is wrong.

    {"call": "meshwright 1", "process_id": 1, "num_processes": 2, "host": "node7", "jax": "0.10.2"}
    {"present": [{…}, {…}]}      or      {"wrong": "processes 2, 3 of 4 did not start within 300 s"}
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from typing import Any

from ...sharding.errors import UserError
from ...sharding.words import first_of
from .address import is_loopback, split_address

Entry = dict[str, Any]

_CALL = "meshwright 1"
_LONGEST_LINE_BYTES = 1 << 20
_RETRY_SECONDS = 0.1
# How much longer than process 0 the others wait, so that its sentence reaches them.
_SLACK_SECONDS = 5.0


def roll_call(me: Entry, coordinator: str, *, timeout_seconds: float) -> list[Entry]:
    """Wait until all processes are there; return what each said of itself, by process id.

    `me` holds at least process_id, num_processes, host and jax (its version). Raises UserError, the same
    sentence in every process that is there, when some are missing, doubled, or of another mind.
    """
    host, port = split_address(coordinator)
    me = {"call": _CALL, **me}
    if me["process_id"] == 0:
        with _listen(host, port) as server:
            return _Gathering(server, me).gather(timeout_seconds)
    return _answer(me, host, port, timeout_seconds)


class _Gathering:
    """Process 0's side: who has called so far, over which connection."""

    def __init__(self, server: socket.socket, me: Entry) -> None:
        self._me = me
        self._present: dict[int, Entry] = {0: me}
        self._heard: dict[socket.socket, bytearray] = {}
        self._callers: dict[socket.socket, int] = {}
        self._wrong: str | None = None
        self._server = server
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)

    def gather(self, timeout_seconds: float) -> list[Entry]:
        """Listen until all are there or something is wrong, and tell everyone which."""
        count = self._me["num_processes"]
        deadline = time.monotonic() + timeout_seconds
        try:
            while len(self._present) < count and self._wrong is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._wrong = self._missing(count, timeout_seconds)
                    break
                for key, _ in self._selector.select(left):
                    self._accept() if key.fileobj is self._server else self._hear(key.fileobj)
            entries = [self._present.get(number) for number in range(count)]
            self._tell({"present": entries} if self._wrong is None else {"wrong": self._wrong})
        finally:
            self._selector.close()
            for connection in self._heard:
                connection.close()
        if self._wrong is not None:
            raise UserError(self._wrong)
        return [entry for entry in entries if entry is not None]

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        connection.setblocking(False)
        self._heard[connection] = bytearray()
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: Any) -> None:
        """Read on; drop a connection that ends or is no roll call (a port scan, a health check)."""
        try:
            words = connection.recv(65536)
        except OSError:
            words = b""
        line = self._heard[connection]
        line += words
        if not words or len(line) > _LONGEST_LINE_BYTES:
            self._drop(connection)
        elif line.endswith(b"\n"):
            entry = _parse(bytes(line))
            if entry is None or entry.get("call") != _CALL:
                self._drop(connection)
            else:
                self._take(connection, entry)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._heard.pop(connection)
        self._present.pop(self._callers.pop(connection, -1), None)
        connection.close()

    def _take(self, connection: socket.socket, entry: Entry) -> None:
        number, before = entry["process_id"], self._present.get(entry["process_id"])
        if before is not None:
            self._wrong = (
                f"two processes are both process {number}: on {before['host']} and on {entry['host']}"
            )
        for key, word in (("num_processes", "num_processes="), ("jax", "JAX ")):
            if entry[key] != self._me[key]:
                self._wrong = (
                    f"process {number} on {entry['host']} has {word}{entry[key]}, "
                    f"process 0 on {self._me['host']} has {word}{self._me[key]}"
                )
        self._callers[connection] = number
        self._present.setdefault(number, entry)

    def _missing(self, count: int, timeout_seconds: float) -> str:
        absent = [number for number in range(count) if number not in self._present]
        return (
            f"process{'es' if len(absent) > 1 else ''} {first_of(absent, 8)} of {count} did not start within "
            f"hosts.timeout_seconds={timeout_seconds:g}"
        )

    def _tell(self, verdict: dict[str, Any]) -> None:
        line = json.dumps(verdict).encode() + b"\n"
        for connection in self._heard:
            with contextlib.suppress(OSError):
                connection.settimeout(_SLACK_SECONDS)
                connection.sendall(line)


def _listen(host: str, port: int) -> socket.socket:
    """Listen on the coordinator's port: on loopback for a loopback address, else on all interfaces."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        raise UserError(f"something else already listens at the coordinator's address {host}:{port}")
    if is_loopback(host):
        family = socket.AF_INET6 if host == "::1" else socket.AF_INET
        address, dual = ("127.0.0.1" if host == "localhost" else host), False
    else:
        dual = socket.has_dualstack_ipv6()
        family, address = (socket.AF_INET6 if dual else socket.AF_INET), ""
    try:
        return socket.create_server(
            (address, port),
            family=family,
            backlog=4096,
            reuse_port=hasattr(socket, "SO_REUSEPORT"),
            dualstack_ipv6=dual,
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at the coordinator's port {port}: {error.strerror}"
        ) from None


def _answer(me: Entry, host: str, port: int, timeout_seconds: float) -> list[Entry]:
    """The other processes' side: call until process 0 answers."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            with socket.create_connection(
                (host, port), timeout=max(_RETRY_SECONDS, deadline - time.monotonic())
            ) as line:
                line.sendall(json.dumps(me).encode() + b"\n")
                line.settimeout(timeout_seconds + _SLACK_SECONDS)
                with line.makefile("rb") as file:
                    verdict = _parse(file.readline())
        except OSError:
            verdict = None
        if verdict is not None and "wrong" in verdict:
            raise UserError(verdict["wrong"])
        if verdict is not None and "present" in verdict:
            return verdict["present"]
        if time.monotonic() >= deadline:
            raise UserError(
                f"process 0 of {me['num_processes']} did not answer at {host}:{port} within "
                f"hosts.timeout_seconds={timeout_seconds:g}"
            )
        time.sleep(_RETRY_SECONDS)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
