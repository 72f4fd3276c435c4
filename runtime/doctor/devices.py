"""The devices that JAX finds, asked in a child process."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ...sharding.hardware.attached import attached_accelerators
from ...sharding.processes import run
from .check import Check

# Asked in the child; its last line of output is the answer.
_PROBE = """
import json, jax
try:
    import flax.nnx
    flax_error = flax_package = None
except Exception as error:
    flax_error, trace = f"{type(error).__name__}: {error}", error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    flax_package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
settings = sorted(name.upper() for name in jax.config.values)
devices = jax.local_devices()
kinds = sorted({device.device_kind for device in devices})
limit = (devices[0].memory_stats() or {}).get("bytes_limit")
found = dict(platform=devices[0].platform, count=len(devices), kinds=kinds, bytes_limit=limit)
found |= {"settings": settings, "flax_error": flax_error, "flax_package": flax_package}
print(json.dumps(found))
"""

_NAMES = {"gpu": "NVIDIA GPUs", "tpu": "TPUs", "rocm": "AMD GPUs"}


def probe(timeout_seconds: float) -> dict[str, Any]:
    """Ask JAX in a child process; {"error": sentence} when it does not answer."""
    try:
        done = run([sys.executable, "-c", _PROBE], timeout_seconds=timeout_seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"JAX did not list its devices within {timeout_seconds:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    flags = [line for line in lines if "Unknown flag" in line]
    reason = (flags or lines or [f"exit code {done.returncode}"])[0 if flags else -1]
    # XLA's log lines begin with a letter, a date, a time, a thread and a source line.
    return {"error": f"JAX cannot start: {re.sub(r'^[FEWI][0-9]{4} .*?[.]cc:[0-9]+[]] ', '', reason)}"}


def devices(answer: Mapping[str, Any]) -> Iterator[Check]:
    """Look at what JAX found, and at what it does not use."""
    attached = attached_accelerators()
    if "error" in answer:
        yield Check(name="devices", value=answer["error"], status="bad", advice=_cure(answer["error"]))
        return
    value = f"{answer['count']} × {answer['platform']} ({', '.join(answer['kinds'])})"
    idle = [kind for kind in attached if kind != answer["platform"]]
    if answer["platform"] == "cpu" and idle and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        advice = f"this machine has {_NAMES[idle[0]]} that JAX does not use: {_plugin(idle[0])}"
        yield Check(name="devices", value=value, status="warn", advice=advice)
    else:
        yield Check(name="devices", value=value)


def _plugin(kind: str) -> str:
    if kind == "gpu":
        version = pathlib.Path("/proc/driver/nvidia/version")
        match = (
            re.search(r"(?:Module|x86_64|aarch64)\s+(\d+)\.", version.read_text())
            if version.exists()
            else None
        )
        # CUDA 13 asks for driver 580 or newer.
        return f'pip install "jax[{"cuda13" if match and int(match[1]) >= 580 else "cuda12"}]"'
    return 'pip install "jax[tpu]"' if kind == "tpu" else 'pip install "jax[rocm]"'


def _cure(error: str) -> str:
    if "Unknown flag" in error:
        return "XLA_FLAGS names a flag that this XLA does not know; correct or unset it"
    if os.environ.get("JAX_PLATFORMS"):
        return f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} asks for what is not here; unset it or say cpu"
    return "another process may hold the accelerator; JAX_PLATFORMS=cpu leaves it out"


def simulated() -> Iterator[Check]:
    """Look at how many devices the environment has JAX simulate."""
    forced = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    count = os.environ.get("JAX_NUM_CPU_DEVICES") or (forced[1] if forced else None)
    if forced and "JAX_NUM_CPU_DEVICES" in os.environ and forced[1] != count:
        advice = f"JAX_NUM_CPU_DEVICES={count} wins over XLA_FLAGS, which says {forced[1]}; unset one"
        yield Check(name="simulated devices", value=f"{count}", status="warn", advice=advice)
    elif count is None:
        yield Check(name="simulated devices", value="none set", advice="topology: cpu:8 simulates 8 in a run")
    else:
        yield Check(name="simulated devices", value=f"{count} (from the environment)")
