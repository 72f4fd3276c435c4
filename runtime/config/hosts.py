"""Which processes make up a run, and how long they wait for one another."""

from __future__ import annotations

import pydantic
from pydantic import Field

from .section import Section


class HostsConfig(Section):
    """How the processes of a run find one another; all null asks the environment, else is one process."""

    coordinator: str | None = Field(
        default=None,
        pattern=r"^(\[[^\]]+\]|[^:\s]+):\d{1,5}$",
        description="`host:port` of process 0, the same on every process; "
        "null asks the environment (Slurm, Open MPI, Kubernetes, Cloud TPU, JAX_COORDINATOR_ADDRESS).",
    )
    num_processes: int | None = Field(
        default=None,
        ge=1,
        description="Processes in the run; null asks the environment. Another number found there is refused.",
    )
    process_id: int | None = Field(
        default=None, ge=0, description="Which of them this one is, from 0; null asks the environment."
    )
    expected_devices: int | None = Field(
        default=None,
        ge=1,
        description="Devices that all processes must have together; null takes what there is.",
    )
    simulated_devices: int | None = Field(
        default=None, ge=1, description="Simulated CPU devices in each process; null uses the real ones."
    )
    local_device_ids: list[int] | None = Field(
        default=None,
        description="Accelerators of this machine that this process may use; "
        "null takes all, or one for each process where several share a machine.",
    )
    timeout_seconds: float = Field(
        default=300.0,
        gt=0,
        description="How long the processes wait for one another before the run is given up.",
    )
    heartbeat_seconds: int = Field(
        default=20,
        ge=3,
        le=300,
        description="A process silent for this long counts as dead, and the run ends.",
    )

    @pydantic.model_validator(mode="after")
    def _belong_together(self) -> HostsConfig:
        if self.process_id is not None and self.num_processes is None:
            raise ValueError(f"process_id={self.process_id} needs num_processes too")
        if self.process_id is not None and self.process_id >= (self.num_processes or 1):
            raise ValueError(
                f"process_id={self.process_id} is not below num_processes={self.num_processes}; "
                f"the last is {(self.num_processes or 1) - 1}"
            )
        if self.coordinator is not None and int(self.coordinator.rsplit(":", 1)[1]) not in range(1, 65536):
            raise ValueError(f"coordinator={self.coordinator!r} has no port between 1 and 65535")
        return self
