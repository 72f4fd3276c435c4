"""What this machine offers a run, and what is wrong with it.

Nothing here starts JAX in the present process: a child does, under a time limit, because an accelerator that
another program holds, or whose driver is broken, makes JAX wait without end.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ..sharding.errors import UserError, nearest

Status = Literal["ok", "warn", "bad"]

_GIB = 1 << 30

# Asked in the child; its last line of output is the answer.
_PROBE = """
import json, jax
settings = sorted(name.upper() for name in jax.config.values)
devices = jax.local_devices()
kinds = sorted({device.device_kind for device in devices})
print(json.dumps(dict(platform=devices[0].platform, count=len(devices), kinds=kinds, settings=settings)))
"""

# Read from the environment by JAX beside its settings proper.
_OTHER_JAX_VARIABLES = {
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_BIND_ADDRESS",
    "JAX_COORDINATOR_PORT",
    "JAX_LOCAL_DEVICE_IDS",
    "JAX_PARTITION_INDEX",
    "JAX_PLATFORM_NAME",
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at: what it is, whether that is well, and what to do if not."""

    name: str
    value: str
    status: Status = "ok"
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the finding as JSON can hold it."""
        return dataclasses.asdict(self)


def examine(*, timeout_seconds: float = 60.0) -> list[Finding]:
    """Look at versions, devices, hosts, compilers, folders and environment of this machine.

    JAX gets `timeout_seconds` to list its devices, in a child process.
    """
    answer = _probe(timeout_seconds)
    return [
        *_versions(),
        *_devices(answer),
        *_simulated(),
        *_hosts(),
        *_compilers(),
        *_machine(),
        *_cache(),
        *_variables(answer.get("settings")),
    ]


def render(findings: list[Finding]) -> Any:
    """Return a rich table of `findings`, with what to do under those that need it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    style = {"ok": "green", "warn": "yellow", "bad": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        value = Text(finding.value)
        if finding.advice:
            value.append(
                f"\n→ {finding.advice}", style="dim" if finding.status == "ok" else style[finding.status]
            )
        table.add_row(Text(finding.status, style=style[finding.status]), finding.name, value)
    wrong = [finding.name for finding in findings if finding.status == "bad"]
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong"
    return Group(table, Text(verdict, style=style["bad" if wrong else "ok"]))


def _versions() -> Iterator[Finding]:
    yield Finding(name="python", value=f"{sys.version.split()[0]} at {sys.executable}")
    wanted = _requirements()
    for name in ("meshwright", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        version, spec = _version(name), wanted.get(name, "")
        if version is None:
            yield Finding(name=name, value="missing", status="bad", advice=f'pip install "{name}{spec}"')
        elif not _satisfies(version, spec):
            advice = f'meshwright needs {spec}: pip install "{name}{spec}"'
            yield Finding(name=name, value=version, status="bad", advice=advice)
        else:
            yield Finding(name=name, value=version)
    jax, jaxlib = _version("jax"), _version("jaxlib")
    if jax and jaxlib and _numbers(jax)[:3] != _numbers(jaxlib)[:3]:
        yield Finding(
            name="jax and jaxlib",
            value=f"jax {jax} beside jaxlib {jaxlib}",
            status="warn" if _numbers(jaxlib)[:2] == _numbers(jax)[:2] else "bad",
            advice=f'pip install "jaxlib=={jax}"',
        )


def _requirements() -> dict[str, str]:
    """Version bounds that this installation of meshwright asks for, by distribution."""
    try:
        lines = importlib.metadata.requires("meshwright") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.fullmatch(r"([\w.-]+)([<>=!~\d.,]*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _satisfies(version: str, spec: str) -> bool:
    """Hold `version` against bounds of the form ``>=1.2,<2``."""
    for bound in filter(None, spec.split(",")):
        limit = _numbers(bound.lstrip("<>="))
        if bound.startswith(">=") and _numbers(version) < limit:
            return False
        if bound.startswith("<") and not bound.startswith("<=") and _numbers(version) >= limit:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe(timeout_seconds: float) -> dict[str, Any]:
    """Ask JAX in a child process; {"error": sentence} when it does not answer."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROBE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"JAX did not list its devices within {timeout_seconds:g} s"}
    if process.returncode == 0:
        return json.loads(output.splitlines()[-1])
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    flags = [line for line in lines if "Unknown flag" in line]
    reason = (flags or lines or [f"exit code {process.returncode}"])[0 if flags else -1]
    # XLA's log lines begin with a letter, a date, a time, a thread and a source line.
    return {"error": f"JAX cannot start: {re.sub(r'^[FEWI][0-9]{4} .*?[.]cc:[0-9]+[]] ', '', reason)}"}


def _devices(answer: Mapping[str, Any]) -> Iterator[Finding]:
    attached = _attached()
    if "error" in answer:
        yield Finding(name="devices", value=answer["error"], status="bad", advice=_cure(answer["error"]))
        return
    value = f"{answer['count']} × {answer['platform']} ({', '.join(answer['kinds'])})"
    idle = [kind for kind in attached if kind != answer["platform"]]
    if answer["platform"] == "cpu" and idle and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        advice = f"this machine has {_NAMES[idle[0]]} that JAX does not use: {_plugin(idle[0])}"
        yield Finding(name="devices", value=value, status="warn", advice=advice)
    else:
        yield Finding(name="devices", value=value)


_NAMES = {"gpu": "NVIDIA GPUs", "tpu": "TPUs", "rocm": "AMD GPUs"}


def _attached() -> list[str]:
    """Kinds of accelerators that the operating system shows, whether or not JAX can use them."""
    signs = {"gpu": "/proc/driver/nvidia/gpus/*", "tpu": "/dev/accel*", "rocm": "/dev/kfd"}
    return [kind for kind, sign in signs.items() if any(pathlib.Path("/").glob(sign.lstrip("/")))]


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


def _simulated() -> Iterator[Finding]:
    forced = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    count = os.environ.get("JAX_NUM_CPU_DEVICES") or (forced[1] if forced else None)
    if forced and "JAX_NUM_CPU_DEVICES" in os.environ and forced[1] != count:
        advice = f"JAX_NUM_CPU_DEVICES={count} wins over XLA_FLAGS, which says {forced[1]}; unset one"
        yield Finding(name="simulated devices", value=f"{count}", status="warn", advice=advice)
    elif count is None:
        yield Finding(
            name="simulated devices", value="none set", advice="topology: cpu:8 simulates 8 in a run"
        )
    else:
        yield Finding(name="simulated devices", value=f"{count} (from the environment)")


def _hosts() -> Iterator[Finding]:
    from . import clusters

    found = clusters.present()
    value = ", ".join(found) or "one process (no Slurm, MPI, Kubernetes or Cloud TPU)"
    try:
        counted = clusters.counted()
    except UserError as error:
        yield Finding(name="hosts", value=value, status="bad", advice=str(error))
        return
    if counted is not None and counted.num_processes > 1:
        value = f"process {counted.process_id} of {counted.num_processes}, started by {counted.source}"
    if "Kubernetes" in found and _version("kubernetes") is None:
        advice = (
            "without the package kubernetes JAX cannot find the other pods of a job: pip install kubernetes"
        )
        yield Finding(name="hosts", value=value, status="warn", advice=advice)
        return
    yield Finding(name="hosts", value=value)


def _compilers() -> Iterator[Finding]:
    libtpu, jaxlib = _version("libtpu"), _version("jaxlib")
    if libtpu:
        yield Finding(name="TPU compiler", value=f"libtpu {libtpu}")
    else:
        advice = "pip install libtpu compiles for TPU pods from here, no TPU needed"
        yield Finding(name="TPU compiler", value="not installed", advice=advice)
    names = [f"jax-cuda{generation}-plugin" for generation in (13, 12)]
    cuda = [(name, version) for name in names if (version := _version(name))]
    if not cuda:
        advice = (
            "pip install jax-cuda13-plugin jax-cuda13-pjrt compiles for GPU clusters from here, no GPU needed"
        )
        yield Finding(name="GPU compiler", value="not installed", advice=advice)
    for name, version in cuda:
        match = version == jaxlib
        advice = "" if match else f'it must match jaxlib {jaxlib}: pip install "{name}=={jaxlib}"'
        yield Finding(
            name="GPU compiler", value=f"{name} {version}", status="ok" if match else "bad", advice=advice
        )


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(name="CPU cores", value=str(cores))
    free = _free_memory_bytes()
    if free is not None:
        advice = "the quickstart needs about 2 GiB" if free < 2 * _GIB else ""
        yield Finding(name="free memory", value=_gib(free), status="warn" if advice else "ok", advice=advice)
    yield _disk("disk here", pathlib.Path.cwd(), "checkpoints fill it")
    shared = pathlib.Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < _GIB // 4:
        advice = "data workers pass batches through it; in a container raise --shm-size"
        yield Finding(name="/dev/shm", value=_gib(size), status="warn", advice=advice)


def _free_memory_bytes() -> int | None:
    """What the machine has left, or what the control group may still take where that is less."""
    meminfo = pathlib.Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    free = int(match[1]) * 1024 if match else None
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return min(free or int(limit), int(limit) - int(used)) if limit.isdecimal() else free


def _disk(name: str, folder: pathlib.Path, use: str) -> Finding:
    free = shutil.disk_usage(folder).free
    status: Status = "bad" if free < _GIB else "warn" if free < 10 * _GIB else "ok"
    return Finding(name=name, value=f"{_gib(free)} free", status=status, advice="" if status == "ok" else use)


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _cache() -> Iterator[Finding]:
    from ..sharding.user_cache import user_cache

    folder = user_cache() / "compiled"
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(home, os.W_OK):
        advice = f"make {home} writable or set compilation_cache to another folder"
        yield Finding(
            name="compilation cache", value=f"{folder} cannot be written", status="warn", advice=advice
        )
        return
    files = [entry.stat().st_size for entry in folder.glob("*") if entry.is_file()] if folder.is_dir() else []
    yield Finding(
        name="compilation cache", value=f"{folder}, {len(files)} files, {sum(files) / 2**20:.0f} MiB"
    )


def _variables(settings: list[str] | None) -> Iterator[Finding]:
    for name, values, effect in _HARMFUL:
        value = os.environ.get(name, "")
        if value.lower() in values.split():
            yield Finding(name=name, value=value, status="warn", advice=f"{effect}; unset it for a real run")
    for name in sorted(os.environ):
        known = {*(settings or ()), *_OTHER_JAX_VARIABLES}
        if settings and name.startswith("JAX_") and name not in known:
            advice = f"JAX has no such setting; {nearest(name, sorted(known))}"
            yield Finding(name=name, value=os.environ[name], status="warn", advice=advice)
    for flag in os.environ.get("XLA_FLAGS", "").split():
        if not flag.startswith("--"):
            yield Finding(
                name="XLA_FLAGS",
                value=flag,
                status="bad",
                advice=f"flags begin with --: --{flag.lstrip('-')}",
            )
