"""What the machine itself has left."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from ...sharding.files import user_cache
from ...sharding.words import gib
from .check import Check, Status

_GIB = 1 << 30


def machine() -> Iterator[Check]:
    """Look at cores, memory and disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check(name="CPU cores", value=str(cores))
    free = _free_memory_bytes()
    if free is not None:
        advice = "the quickstart needs about 2 GiB" if free < 2 * _GIB else ""
        yield Check(name="free memory", value=gib(free), status="warn" if advice else "ok", advice=advice)
    yield _disk("disk here", pathlib.Path.cwd(), "checkpoints fill it")
    shared = pathlib.Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < _GIB // 4:
        advice = "data workers pass batches through it; in a container raise --shm-size"
        yield Check(name="/dev/shm", value=gib(size), status="warn", advice=advice)


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


def _disk(name: str, folder: pathlib.Path, use: str) -> Check:
    free = shutil.disk_usage(folder).free
    status: Status = "bad" if free < _GIB else "warn" if free < 10 * _GIB else "ok"
    return Check(name=name, value=f"{gib(free)} free", status=status, advice="" if status == "ok" else use)


def cache() -> Iterator[Check]:
    """Look at the folder that keeps compiled programs."""
    folder = user_cache() / "compiled"
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(home, os.W_OK):
        advice = f"make {home} writable or set compilation_cache to another folder"
        yield Check(
            name="compilation cache", value=f"{folder} cannot be written", status="warn", advice=advice
        )
        return
    files = [entry.stat().st_size for entry in folder.glob("*") if entry.is_file()] if folder.is_dir() else []
    yield Check(name="compilation cache", value=f"{folder}, {len(files)} files, {sum(files) / 2**20:.0f} MiB")
