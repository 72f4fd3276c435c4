"""What the processes of a job tell each other about a checkpoint, so that all use the same one."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

_TEXT_BYTES = 1024


def from_first(number: int) -> int:
    """Return the number that process 0 gives; every process must call this."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def first_fault(fault: str | None) -> str | None:
    """Return a fault if any process reports one, the same on all; every process must call this."""
    if jax.process_count() == 1:
        return fault
    text = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = (fault or "").encode()[:_TEXT_BYTES]
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(text)).reshape(jax.process_count(), _TEXT_BYTES)
    for rank, row in enumerate(everyone):
        said = bytes(row).rstrip(b"\0").decode(errors="replace")
        if said:
            return f"{said} (process {rank})"
    return None
