"""What the environment says about the processes of a job: the launcher's own words, or JAX's detection.

JAX's detection has no public door: `jax._src.clusters`, the same in 0.10 and 0.12, is read here only.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ...sharding.errors import UserError, one_line

# Set by `meshwright launch` for each process it starts.
COORDINATOR = "MESHWRIGHT_COORDINATOR"
NUM_PROCESSES = "MESHWRIGHT_NUM_PROCESSES"
PROCESS_ID = "MESHWRIGHT_PROCESS_ID"
# Honoured by JAX itself wherever it starts several processes.
JAX_COORDINATOR = "JAX_COORDINATOR_ADDRESS"

# Started by: (number of processes, number of this one). Slurm's are those of a step, which only srun makes.
_COUNTERS = {
    "meshwright launch": (NUM_PROCESSES, PROCESS_ID),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "MPI": ("PMI_SIZE", "PMI_RANK"),
}
_NAMES = {
    "SlurmCluster": "Slurm",
    "OmpiCluster": "Open MPI",
    "K8sCluster": "Kubernetes",
    "GceTpuCluster": "Cloud TPU",
    "GkeTpuCluster": "Cloud TPU on Kubernetes",
    "Mpi4pyCluster": "MPI",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detected:
    """Who started this process, beside whom; `coordinator` is None where the environment does not say."""

    source: str
    num_processes: int
    process_id: int
    coordinator: str | None


def counted(environment: Mapping[str, str] = os.environ) -> Detected | None:
    """Read the launcher's variables alone: no JAX, no network. None when no starter left any."""
    for source, (size_name, id_name) in _COUNTERS.items():
        size, number = environment.get(size_name), environment.get(id_name)
        if size is None or number is None:
            continue
        if not (size.isdecimal() and number.isdecimal() and int(number) < int(size)):
            raise UserError(
                f"{size_name}={size!r} and {id_name}={number!r} do not number a process among several; "
                f"unset them or set hosts.num_processes and hosts.process_id"
            )
        address = environment.get(COORDINATOR) if source == "meshwright launch" else None
        coordinator = address or environment.get(JAX_COORDINATOR)
        return Detected(
            source=source, num_processes=int(size), process_id=int(number), coordinator=coordinator
        )
    return None


def detect(timeout_seconds: float, environment: Mapping[str, str] = os.environ) -> Detected | None:
    """Say who started this process: `meshwright launch`, else what JAX detects, else the counters alone.

    None for a process on its own. Raises UserError when a cluster is there but cannot be asked.
    """
    by_count = counted(environment)
    if by_count is not None and (by_count.coordinator is not None or by_count.num_processes == 1):
        return by_count
    cluster = _jax_cluster()
    if cluster is None:
        return by_count
    source = _NAMES.get(cluster.__name__) or cluster.__name__
    try:
        size, number = cluster.get_process_count(), cluster.get_process_id()
        coordinator = environment.get(JAX_COORDINATOR)
        if coordinator is None and size > 1:
            coordinator = cluster.get_coordinator_address(
                timeout_secs=int(timeout_seconds),
                override_coordinator_port=environment.get("JAX_COORDINATOR_PORT"),
            )
    except (RuntimeError, ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        reason = one_line(error)
        raise UserError(
            f"{source} is there but does not say which processes belong together ({reason}); "
            "set hosts.coordinator, hosts.num_processes and hosts.process_id, or hosts.num_processes=1"
        ) from error
    return Detected(source=source, num_processes=size, process_id=number, coordinator=coordinator)


def present() -> list[str]:
    """Name the clusters whose variables are set here, without asking anyone."""
    found = [source for source, names in _COUNTERS.items() if all(name in os.environ for name in names)]
    found += ["Kubernetes"] if "KUBERNETES_SERVICE_HOST" in os.environ else []
    found += ["Cloud TPU"] if {"TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"} <= os.environ.keys() else []
    return found


def _jax_cluster() -> Any:
    from jax._src import clusters

    for cluster in clusters.ClusterEnv._cluster_types:
        if not cluster.opt_in_only_method and cluster.is_env_present():
            return cluster
    return None
