"""Processes that meet, or say in one sentence why they do not, over real sockets."""

from __future__ import annotations

import concurrent.futures
import socket

import pytest
from meshwright.runtime.hosts.address import reserved_port
from meshwright.runtime.hosts.roll_call import roll_call
from meshwright.sharding.errors import UserError


def call(number: int, count: int, port: int, seconds: float = 20, **changes: object) -> list[dict] | str:
    me = {"process_id": number, "num_processes": count, "host": f"node{number}", "jax": "1.0", **changes}
    try:
        return roll_call(me, f"127.0.0.1:{port}", timeout_seconds=seconds)
    except UserError as error:
        return str(error)


def call_all(port: int, *calls: dict) -> list[list[dict] | str]:
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [f.result() for f in [pool.submit(call, port=port, **words) for words in calls]]


def test_everyone_hears_of_everyone() -> None:
    with reserved_port() as port:
        answers = call_all(port, *({"number": number, "count": 3} for number in (2, 1, 0)))
    assert all([entry["host"] for entry in answer] == ["node0", "node1", "node2"] for answer in answers)


def test_the_missing_are_named_to_all_who_came() -> None:
    with reserved_port() as port:
        answers = call_all(port, *({"number": number, "count": 4, "seconds": 0.7} for number in (0, 2)))
    assert set(answers) == {"processes 1, 3 of 4 did not start within hosts.timeout_seconds=0.7"}


def test_process_0_missing() -> None:
    with reserved_port() as port:
        answer = call(1, 2, port, seconds=0.3)
    assert answer == f"process 0 of 2 did not answer at 127.0.0.1:{port} within hosts.timeout_seconds=0.3"


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ({"count": 3}, "process 1 on node1 has num_processes=3, process 0 on node0 has num_processes=2"),
        ({"count": 2, "jax": "0.9"}, "process 1 on node1 has JAX 0.9, process 0 on node0 has JAX 1.0"),
    ],
)
def test_of_another_mind(second: dict, sentence: str) -> None:
    with reserved_port() as port:
        answers = call_all(port, {"number": 0, "count": 2}, {"number": 1, **second})
    assert answers == [sentence, sentence]


def test_doubled_process() -> None:
    with reserved_port() as port:
        answers = call_all(
            port,
            {"number": 0, "count": 3},
            {"number": 1, "count": 3},
            {"number": 1, "count": 3, "host": "other"},
        )
    assert len(set(map(str, answers))) == 1
    assert "two processes are both process 1: on" in str(answers[0])


def test_strangers_at_the_port_do_not_disturb() -> None:
    with reserved_port() as port, concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, 0, 2, port)
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"present": []}\n', b"[1]\n"):
            stranger = connect(port)
            stranger.sendall(words)
            stranger.close()
        second = pool.submit(call, 1, 2, port)
        assert first.result() == second.result()
        assert len(first.result()) == 2


def connect(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except ConnectionRefusedError:
            continue


def test_port_in_use_by_another_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert (
            call(0, 2, port)
            == f"something else already listens at the coordinator's address 127.0.0.1:{port}"
        )
