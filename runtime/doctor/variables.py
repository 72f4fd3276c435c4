"""Variables of the environment that matter to a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from ...sharding.errors import UserError, nearest
from ...sharding.hardware.chip import chip_of_device_kind
from ...sharding.hardware.memory import ALLOCATOR, FRACTIONS, PREALLOCATE, share_here
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


def memory(answer: Mapping[str, Any]) -> Iterator[Check]:
    """Say what JAX reserves of each GPU that it found, or that it refuses what the environment asks for."""
    if answer.get("platform") != "gpu":
        return
    limit = answer.get("bytes_limit")
    chip = chip_of_device_kind(answer["kinds"][0], "gpu")
    try:
        share = share_here(chip.memory_share)
    except UserError as error:
        yield Check(name="memory", value="", status="bad", advice=str(error))
        return
    words = f"JAX may use {share:.0%} of each GPU's"
    if chip.hbm_bytes is not None:
        words += f" {chip.hbm_bytes / 2**30:.1f} GiB, {chip.hbm_bytes * share / 2**30:.1f} GiB"
    if limit:
        words += f"; it says {limit / 2**30:.1f} GiB"
    names = [name for name in (*FRACTIONS, PREALLOCATE, ALLOCATOR) if os.environ.get(name)]
    words += f" ({', '.join(f'{name}={os.environ[name]}' for name in names)})" if names else ""
    yield Check(name="memory", value=words)


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
