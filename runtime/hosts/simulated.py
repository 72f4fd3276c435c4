"""Threads for simulated devices."""

from __future__ import annotations

import os

# XLA's variable for the size of its CPU thread pools, read when a CPU client is made.
_THREADS = "NPROC"
# Collectives of a device that can be ready at once: about as many as a layer has parameters to gather.
_PER_DEVICE = 8


def enough_threads(num_devices: int) -> None:
    """Give XLA enough threads for `num_devices` simulated devices of this process; call before JAX starts.

    By default there are as many threads as devices. A collective holds a thread until all its devices have
    come, and devices begin theirs in different orders: all threads can be held by collectives whose other
    devices wait for a thread, and XLA ends the process after 40 s.
    """
    given = os.environ.get(_THREADS, "")
    os.environ[_THREADS] = str(max(int(given) if given.isdigit() else 0, _PER_DEVICE * num_devices))
