"""The cluster that a process may be part of."""

from __future__ import annotations

from collections.abc import Iterator

from ...sharding.errors import UserError
from ..hosts import clusters
from .check import Check
from .versions import version_of


def hosts() -> Iterator[Check]:
    """Look for what started this process among others."""
    found = clusters.present()
    value = ", ".join(found) or "one process (no Slurm, MPI, Kubernetes or Cloud TPU)"
    try:
        counted = clusters.counted()
    except UserError as error:
        yield Check(name="hosts", value=value, status="bad", advice=str(error))
        return
    if counted is not None and counted.num_processes > 1:
        value = f"process {counted.process_id} of {counted.num_processes}, started by {counted.source}"
    if "Kubernetes" in found and version_of("kubernetes") is None:
        advice = (
            "without the package kubernetes JAX cannot find the other pods of a job: pip install kubernetes"
        )
        yield Check(name="hosts", value=value, status="warn", advice=advice)
        return
    yield Check(name="hosts", value=value)
