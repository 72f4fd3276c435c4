"""Variables of the environment that matter to a run."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ...sharding.errors import nearest
from .check import Check

# Read from the environment by JAX beside its settings proper.
_OTHER_JAX_VARIABLES = {
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_BIND_ADDRESS",
    "JAX_COORDINATOR_PORT",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_PARTITION_INDEX",
    "JAX_PLATFORM_NAME",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK",
    "JAX_SLICE_INDEX",
}

# Variables that slow a run down or change its numbers: (name, values that do, what happens).
_HARMFUL = (
    ("JAX_DISABLE_JIT", "true 1 yes on", "nothing is compiled; every operation runs on its own"),
    ("JAX_DEBUG_NANS", "true 1 yes on", "every step is waited for, and run again where a NaN shows"),
    ("JAX_ENABLE_X64", "true 1 yes on", "numbers default to 64 bits, twice the memory"),
    ("JAX_ENABLE_COMPILATION_CACHE", "false 0 no off", "every start compiles anew"),
    ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform", "every buffer is allocated by the driver, which is slow"),
    ("XLA_PYTHON_CLIENT_PREALLOCATE", "false 0", "GPU memory is taken piece by piece and fragments"),
)


def variables(settings: list[str] | None) -> Iterator[Check]:
    """Look for variables that slow a run down, change its numbers or mean nothing.

    `settings` are the variables that JAX knows, or None where it did not say.
    """
    for name, values, effect in _HARMFUL:
        value = os.environ.get(name, "")
        if value.lower() in values.split():
            yield Check(name=name, value=value, status="warn", advice=f"{effect}; unset it for a real run")
    for name in sorted(os.environ):
        known = {*(settings or ()), *_OTHER_JAX_VARIABLES}
        if settings and name.startswith("JAX_") and name not in known:
            advice = f"JAX has no such setting; {nearest(name, sorted(known))}"
            yield Check(name=name, value=os.environ[name], status="warn", advice=advice)
    for flag in os.environ.get("XLA_FLAGS", "").split():
        if not flag.startswith("--"):
            yield Check(
                name="XLA_FLAGS",
                value=flag,
                status="bad",
                advice=f"flags begin with --: --{flag.lstrip('-')}",
            )
