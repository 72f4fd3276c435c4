"""Compile in a process of its own, within limits of time and memory, and end it whatever happens."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from ..processes import end_all, endings, fate, start

_LOG_LINES = 6
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one compile may take: wall-clock seconds, and bytes of resident memory."""

    seconds: float = 900.0
    memory_bytes: float = 20 * 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """How a child ended: its `answer` (see `worker`), and the `hlo` it left, gzipped."""

    answer: Mapping[str, Any]
    hlo: bytes


def run_worker(
    request: Mapping[str, Any], program: bytes, environment: Mapping[str, str], limits: Limits
) -> Ran:
    """Have a child compile `program`; an outcome of its own says when it was stopped or died."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as name:
        folder = pathlib.Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (folder / "program.bin").write_bytes(program)
        with (folder / "log.txt").open("wb") as log:
            command = [sys.executable, "-m", f"{__package__}.worker", name]
            process = start(command, env={**os.environ, **environment}, stdout=log)
            try:
                stopped = _watch(process, limits)
            finally:
                end_all([process], grace_seconds=0)
        text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        return Ran(answer=stopped or _answer(folder, process, text), hlo=_hlo(folder))


def _watch(process: subprocess.Popen[Any], limits: Limits) -> dict[str, Any] | None:
    """Wait for the end; return an answer if the process goes over its limits."""
    end = time.monotonic() + limits.seconds
    for ended in endings([process]):
        if ended is not None:
            break
        if time.monotonic() > end:
            return {"outcome": "timed_out", "message": f"the compiler took longer than {limits.seconds:g} s"}
        used = _resident_bytes(process.pid)
        if used > limits.memory_bytes:
            return {
                "outcome": "too_large",
                "message": f"the compiler took {used / 2**30:.1f} GiB of this machine's memory; "
                f"its limit is {limits.memory_bytes / 2**30:.1f} GiB",
            }
    return None


def _answer(folder: pathlib.Path, process: subprocess.Popen[Any], log: str) -> dict[str, Any]:
    try:
        return json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = " | ".join(line.strip() for line in log.splitlines()[-_LOG_LINES:] if line.strip())
        said = f": {last}" if last else ""
        return {"outcome": "died", "message": f"the compiler's process {fate(process.returncode)}{said}"}


def _hlo(folder: pathlib.Path) -> bytes:
    path = folder / "program.hlo.gz"
    return path.read_bytes() if path.exists() else b""


def _resident_bytes(pid: int) -> float:
    """Return the memory that a process holds; 0 where the system does not tell."""
    try:
        return float(pathlib.Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0.0
