"""The processes of a run find one another, and the run starts only when all of them are there.

    hosts = initialize(config.hosts)             # before anything makes JAX look for its devices
    if hosts.is_main: …

`initialize` takes the explicit address of the config, else what `meshwright launch`, Slurm, Open MPI,
Kubernetes or Cloud TPU say, else runs alone. `simulate` alone gives one process simulated devices.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
import socket
import warnings

from ...sharding.errors import UserError, nearest_divisors, one_line
from ..config.hosts import HostsConfig
from . import clusters
from .address import is_loopback, split_address
from .roll_call import Entry, roll_call
from .simulated import simulate

# After the roll call every process is known to be alive; this covers only JAX's own handshake.
_CONNECT_SECONDS = 60
# The last process may still be writing a checkpoint when the first is done.
_SHUTDOWN_SECONDS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """The processes of a run, as this one sees them once they have met."""

    source: str
    process_id: int
    num_processes: int
    num_devices: int
    num_local_devices: int
    coordinator: str | None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.process_id == 0

    def __str__(self) -> str:
        if self.num_processes == 1:
            return f"1 process, {self.num_devices} devices"
        return (
            f"process {self.process_id} of {self.num_processes} ({self.source}), "
            f"{self.num_local_devices} of {self.num_devices} devices, coordinator {self.coordinator}"
        )


def initialize(config: HostsConfig, *, simulated_devices: int | None = None) -> Hosts:
    """Join the other processes of the run, within `config.timeout_seconds`; check that all is as expected.

    `simulated_devices` is the number of simulated CPU devices of the whole run, shared out evenly
    (`config.simulated_devices` is that of each process). Must be called before JAX looks for its devices.
    Raises UserError, one sentence in every process that is there: which processes are missing, doubled or of
    another mind; how many devices there are when `expected_devices` says otherwise.
    """
    place = _place(config)
    if place.num_processes == 1:
        _simulate_share(config, simulated_devices, 1)
        return _checked(config, place)
    if place.coordinator is None:
        raise UserError(
            f"{place.source} says that there are {place.num_processes} processes but not where process 0 is; "
            "set hosts.coordinator=host:port"
        )
    entries = roll_call(_introduction(place), place.coordinator, timeout_seconds=config.timeout_seconds)
    _simulate_share(config, simulated_devices, place.num_processes)
    _connect(config, place, place.coordinator, _own_devices(config, entries, place.process_id))
    return _checked(config, place)


def _place(config: HostsConfig) -> clusters.Detected:
    """Which process this is among how many: the config's words, the gaps filled by the environment."""
    explicit = None not in (config.coordinator, config.num_processes, config.process_id)
    alone = config.num_processes == 1 and config.coordinator is None
    found = clusters.counted() if explicit or alone else clusters.detect(config.timeout_seconds)
    if found is not None and not (explicit and found.source != "meshwright launch"):
        _agree(found, "num_processes", config.num_processes)
        _agree(found, "process_id", config.process_id)
    num_processes = config.num_processes or (found.num_processes if found else None)
    process_id = config.process_id if config.process_id is not None else found.process_id if found else None
    coordinator = config.coordinator or (found.coordinator if found else None)
    if alone or (num_processes is None and coordinator is None):
        return clusters.Detected(source="one process", num_processes=1, process_id=0, coordinator=None)
    if num_processes is None or process_id is None:
        lacking = "hosts.num_processes" if num_processes is None else "hosts.process_id"
        known = f"hosts.coordinator={coordinator}" if coordinator else f"hosts.num_processes={num_processes}"
        raise UserError(f"{known} is set but neither {lacking} nor the environment says the rest")
    source = "explicit address" if config.coordinator or found is None else found.source
    return clusters.Detected(
        source=source, num_processes=num_processes, process_id=process_id, coordinator=coordinator
    )


def _agree(found: clusters.Detected, name: str, configured: int | None) -> None:
    if configured is not None and configured != getattr(found, name):
        raise UserError(f"hosts.{name}={configured}, but {found.source} says {name}={getattr(found, name)}")


def _simulate_share(config: HostsConfig, simulated_devices: int | None, num_processes: int) -> None:
    """Set up this process's part of the simulated devices, if there are any."""
    each = config.simulated_devices
    if simulated_devices is not None:
        if simulated_devices % num_processes:
            below = simulated_devices // num_processes * num_processes
            raise UserError(
                f"{simulated_devices} simulated devices do not divide among {num_processes} processes; "
                f"nearest: {nearest_divisors(simulated_devices, num_processes)} processes, or "
                f"{f'{below} or ' if below else ''}{below + num_processes} devices"
            )
        share = simulated_devices // num_processes
        if each is not None and each != share:
            raise UserError(
                f"hosts.simulated_devices={each} in each of {num_processes} processes is not "
                f"the {simulated_devices} in all that the topology asks for; nearest: {share}"
            )
        each = share
    if each is not None:
        simulate(each)


def _introduction(place: clusters.Detected) -> Entry:
    return {
        "process_id": place.process_id,
        "num_processes": place.num_processes,
        "host": socket.gethostname(),
        "jax": importlib.metadata.version("jax"),
        "gpus": _visible_gpus(),
    }


def _visible_gpus() -> list[str]:
    """Name the GPUs this process may use, before JAX has looked: CUDA's variable, else the driver's list."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [word for word in visible.split(",") if word.strip()]
    return sorted(entry.name for entry in pathlib.Path("/proc/driver/nvidia/gpus").glob("*"))


def _own_devices(config: HostsConfig, entries: list[Entry], process_id: int) -> list[int] | None:
    """Which GPUs of this machine are this process's: all it sees, or its part where several see the same.

    JAX itself gives one GPU to each process that Slurm or Open MPI starts, however many there are.
    """
    if config.local_device_ids is not None:
        return config.local_device_ids
    me = entries[process_id]
    beside = [entry["process_id"] for entry in entries if entry["host"] == me["host"]]
    same = all(entries[number]["gpus"] == me["gpus"] for number in beside)
    count = len(me["gpus"])
    if len(beside) == 1 or not same or count < len(beside):
        return None
    if count % len(beside):
        raise UserError(
            f"{count} GPUs of {me['host']} cannot be shared evenly by its {len(beside)} processes; "
            "set hosts.local_device_ids in each"
        )
    share = count // len(beside)
    first = beside.index(process_id) * share
    return list(range(first, first + share))


def _connect(
    config: HostsConfig, place: clusters.Detected, coordinator: str, local_device_ids: list[int] | None
) -> None:
    import jax

    host, _ = split_address(coordinator)
    try:
        jax.distributed.initialize(
            coordinator,
            place.num_processes,
            place.process_id,
            local_device_ids=local_device_ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=coordinator if is_loopback(host) else None,
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        reason = one_line(error)
        raise UserError(
            f"process {place.process_id} cannot join the others at {coordinator}: {reason}"
        ) from error


def _checked(config: HostsConfig, place: clusters.Detected) -> Hosts:
    """Look at the devices of the whole run and compare them with what the config expects."""
    import jax

    hosts = Hosts(
        source=place.source,
        process_id=jax.process_index(),
        num_processes=jax.process_count(),
        num_devices=jax.device_count(),
        num_local_devices=jax.local_device_count(),
        coordinator=place.coordinator if place.num_processes > 1 else None,
    )
    if hosts.num_processes != place.num_processes:
        raise UserError(
            f"{place.num_processes} processes met but JAX's {jax.default_backend()} devices "
            f"belong to {hosts.num_processes}"
        )
    counts = [0] * hosts.num_processes
    for device in jax.devices():
        counts[device.process_index] += 1
    if config.expected_devices is not None and hosts.num_devices != config.expected_devices:
        parts = " + ".join(map(str, counts[:8])) + (" + …" if len(counts) > 8 else "")
        raise UserError(
            f"hosts.expected_devices={config.expected_devices}, but there are {hosts.num_devices}"
            + (
                f" ({parts} in {len(counts)} processes)"
                if len(counts) > 1
                else f" {jax.default_backend()} devices"
            )
        )
    if len(set(counts)) > 1:
        warnings.warn(f"processes have different numbers of devices: {counts}", stacklevel=3)
    return hosts
