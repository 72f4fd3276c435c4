"""Simulated CPU devices of one process, with the threads that their collectives need."""

from __future__ import annotations

import os

from ...sharding.errors import UserError
from ...sharding.hardware.attached import quiet_absent

# XLA's variable for the size of its CPU thread pools, read when a CPU client is made.
_THREADS = "NPROC"
# Collectives of a device that can be ready at once: about as many as a layer has parameters to gather.
_PER_DEVICE = 8


def simulate(num_devices: int) -> None:
    """Give this process `num_devices` simulated CPU devices; UserError once JAX has started with others.

    >>> simulate(8)
    >>> import jax
    >>> jax.device_count()
    8
    """
    if num_devices < 1:
        raise UserError(f"simulated devices={num_devices} is below 1")
    import jax

    quiet_absent()
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
        enough_threads(num_devices)
    except RuntimeError:
        if jax.default_backend() == "cpu" and jax.local_device_count() == num_devices:
            return
        raise UserError(
            f"JAX has already started with {jax.local_device_count()} {jax.default_backend()} devices, "
            f"too late to simulate {num_devices}; call simulate({num_devices}) first, or start with "
            f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={num_devices}"
        ) from None
    jax.config.update("jax_platforms", "cpu")


def leave_devices() -> None:
    """Have JAX start on this process's CPU alone; call before it starts, where no device is asked for.

    Accelerators, which another process may hold, stay as they are; their plugins are not loaded.
    """
    import jax

    quiet_absent()
    jax.config.update("jax_platforms", "cpu")


def enough_threads(num_devices: int) -> None:
    """Give XLA enough threads for `num_devices` simulated devices of this process; call before JAX starts.

    By default there are as many threads as devices. A collective holds a thread until all its devices have
    come, and devices begin theirs in different orders: all threads can be held by collectives whose other
    devices wait for a thread, and XLA ends the process after 40 s.
    """
    given = os.environ.get(_THREADS, "")
    os.environ[_THREADS] = str(max(int(given) if given.isdigit() else 0, _PER_DEVICE * num_devices))
