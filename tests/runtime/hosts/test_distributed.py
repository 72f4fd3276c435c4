"""Starting a run of one or several processes; each test that starts JAX does so in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from forks import forked
from meshwright.runtime.config import HostsConfig
from meshwright.runtime.hosts import initialize, simulate
from meshwright.runtime.hosts.address import reserved_port
from meshwright.sharding import processes
from meshwright.sharding.errors import UserError

pytestmark = pytest.mark.numerics

SCRIPT = """
import sys, json
from meshwright.runtime.hosts import initialize
from meshwright.runtime.config import HostsConfig
from meshwright.sharding.errors import UserError
words = json.loads(sys.argv[1])
total = words.pop("total", None)
try:
    hosts = initialize(HostsConfig(**words), simulated_devices=total)
except UserError as error:
    sys.exit(f"error: {error}")
import jax, jax.numpy as jnp
mesh = jax.make_mesh((hosts.num_devices,), ("data",))
ones = jax.jit(lambda: jnp.ones(hosts.num_devices), out_shardings=jax.NamedSharding(mesh, jax.P("data")))()
print(hosts, "main" if hosts.is_main else "other", float(jax.jit(jnp.sum)(ones)))
"""

CLUSTERS = ("SLURM_", "OMPI_", "PMI_", "KUBERNETES_", "TPU_", "JAX_COORD", "JAX_NUM_CPU", "MESHWRIGHT_")


def start(words: str, **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTERS)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words_of_child = clean | {"JAX_PLATFORMS": "cpu"} | environment
    return processes.start(forked([sys.executable, "-c", SCRIPT, words]), env=words_of_child, **pipes)


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    results = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *words) for process, words in zip(processes, results, strict=True)]


def test_explicit_address_joins_two_processes() -> None:
    with reserved_port() as port:
        words = f'"coordinator": "127.0.0.1:{port}", "num_processes": 2, "expected_devices": 6'
        first, second = finish(*(start(f'{{{words}, "total": 6, "process_id": {n}}}') for n in range(2)))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert (
        f"process 0 of 2 (explicit address), 3 of 6 devices, coordinator 127.0.0.1:{port} main 6.0"
        in first[1]
    )
    assert "process 1 of 2 (explicit address), 3 of 6 devices" in second[1]
    assert "other 6.0" in second[1]


def test_slurm_joins_and_device_count_is_checked() -> None:
    """Two tasks of a Slurm step; the config expects more devices than there are."""
    with reserved_port() as port:
        words = '{"simulated_devices": 1, "timeout_seconds": 60, "expected_devices": 8}'
        slurm = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        slurm |= {"SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_PORT": str(port)}
        tasks = [start(words, SLURM_PROCID=str(n), SLURM_LOCALID=str(n), **slurm) for n in range(2)]
        for code, _, errors in finish(*tasks):
            assert code == 1
            assert "error: hosts.expected_devices=8, but there are 2 (1 + 1 in 2 processes)" in errors
            assert "Traceback" not in errors


def test_peer_that_never_starts_is_named_without_an_abort() -> None:
    with reserved_port() as port:
        words = (
            f'"coordinator": "127.0.0.1:{port}", "num_processes": 2, "process_id": 0, "timeout_seconds": 0.5'
        )
        [(code, _, errors)] = finish(start(f"{{{words}}}"))
    assert (code, errors.strip()) == (
        1,
        "error: process 1 of 2 did not start within hosts.timeout_seconds=0.5",
    )


def test_one_process_needs_no_words() -> None:
    [(code, output, errors)] = finish(start('{"total": 2}'))
    assert code == 0, errors
    assert output.strip() == "1 process, 2 devices main 2.0"


@pytest.mark.parametrize(
    ("environment", "config", "sentence"),
    [
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            {},
            "Open MPI says that there are 4 processes",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            {"num_processes": 1},
            "num_processes=1, but Open",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "4"}, {}, "do not number a process"),
        ({}, {"coordinator": "a:1"}, "hosts.coordinator=a:1 is set but neither hosts.num_processes nor"),
        ({}, {"num_processes": 2}, "hosts.num_processes=2 is set but neither hosts.process_id nor"),
        (
            {},
            {"num_processes": 2, "process_id": 0},
            "not where process 0 is; set hosts.coordinator=host:port",
        ),
    ],
)
def test_contradictions_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], config: dict, sentence: str
) -> None:
    for name in [name for name in os.environ if name.startswith(CLUSTERS)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        initialize(HostsConfig(**config))


@pytest.mark.devices(2)
def test_simulating_too_late_is_said() -> None:
    import jax

    assert jax.device_count() == 2
    simulate(2)
    with pytest.raises(
        UserError, match=r"already started with 2 cpu devices, too late to simulate 4; call simulate"
    ):
        simulate(4)


def test_shares_must_be_even(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not the 8 in all that the topology asks for; nearest: 8"):
        initialize(HostsConfig(num_processes=1, simulated_devices=3), simulated_devices=8)
