"""Read a captured profile from a run's folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from ...sharding import Plan
from ...sharding.errors import UserError
from .analyse import analyse
from .events import OpEvent, Trace
from .executions import busiest_module
from .marker import any_left
from .pipeline import pipeline_time
from .profile import Profile
from .program import load_program
from .xplane import SUFFIXES, read_xplane

#: The folder inside of a run's that profiles are captured in.
PROFILE_FOLDER = "profile"

#: The plan that the run goes by, beside it.
PLAN = "plan.json"

# Files of other profilers, and of JAX's for other viewers, by how their names end.
_OTHERS = {
    ".trace.json.gz": "a trace for Perfetto or Chrome, as PyTorch's profiler writes too",
    "_trace.json.gz": "a trace for Perfetto, as JAX writes beside its own",
    ".trace.json": "a trace for Perfetto or Chrome, as PyTorch's profiler writes too",
    ".perfetto-trace": "a trace for Perfetto",
    ".nsys-rep": "a report of Nsight Systems",
    ".qdrep": "a report of Nsight Systems",
    ".ncu-rep": "a report of Nsight Compute",
    ".rpd": "a database of ROCm's profiler",
    ".zip": "packed: unpack it first",
    ".tar.gz": "packed: unpack it first",
    ".tgz": "packed: unpack it first",
}

_HOW = "train with profile.start_step=10 profile.num_steps=3 to capture one"
_LEFT = "a process is in its window, or died in it and left {}: remove that file to have it captured again"


def profile_run(run: str | Path) -> Profile:
    """Read the newest profile of a run's folder, and what the run's plan was predicted to cost.

    `run` may as well be any folder with traces in it, or one trace, of any JAX program.

    Raises:
        UserError: The folder does not exist, holds no profile, or holds a damaged one or a damaged plan.
    """
    run = Path(run)
    if run.is_file():
        if not run.name.endswith(SUFFIXES):
            raise UserError(f"{run} is {_kind(run)}: what is read is {' or '.join(SUFFIXES)}")
        return analyse({0: read_xplane(run)}, None, [str(run)])
    if not run.is_dir():
        raise UserError(f"there is no run folder at {run}")
    if not (run / PROFILE_FOLDER).is_dir():
        if not _sessions(run):
            other = next((file for suffix in _OTHERS for file in sorted(run.rglob(f"*{suffix}"))), None)
            if other is not None:
                raise UserError(
                    f"{run} holds no profile of JAX's: {other.name} is {_kind(other)}, and what is read is "
                    f"{' or '.join(SUFFIXES)}"
                )
            raise UserError(f"the run {run} has captured no profile: {_HOW}")
        return read_profile(run)
    profile = read_profile(run / PROFILE_FOLDER)
    return _with_estimate(profile, run / PLAN) if (run / PLAN).is_file() else profile


def read_profile(directory: str | Path) -> Profile:
    """Read the newest session in a profile folder: every process's trace, and the program saved beside them.

    Raises:
        UserError: Nothing was captured in `directory`, or what was is truncated or damaged.
    """
    directory = Path(directory)
    sessions = _sessions(directory)
    if not sessions:
        left = any_left(directory)
        why = _HOW if left is None else _LEFT.format(left.name)
        raise UserError(f"no profile was captured in {directory}: {why}")
    newest = max(sessions.values(), key=lambda files: max(file.stat().st_mtime_ns for file in files))
    traces = {number: read_xplane(file) for number, file in _processes(newest).items()}
    _check_one_program(dict(zip((file.name for file in newest), traces.values(), strict=False)))
    profile = analyse(traces, load_program(directory), [str(file) for file in newest])
    if len(sessions) == 1:
        return profile
    note = f"of {len(sessions)} folders with traces in {directory} the newest is read, {newest[0].parent}"
    return dataclasses.replace(profile, notes=(*profile.notes, note))


def _sessions(directory: Path) -> dict[Path, list[Path]]:
    """Return the files of traces below a folder, by the folder that they lie in."""
    sessions: dict[Path, list[Path]] = {}
    for suffix in SUFFIXES:
        for trace in sorted(directory.rglob(f"*{suffix}")):
            # Packed beside the same trace unpacked it would be a process of its own.
            if not (trace.suffix == ".gz" and trace.with_suffix("").is_file()):
                sessions.setdefault(trace.parent, []).append(trace)
    return sessions


def _kind(file: Path) -> str:
    """Say what a file is that is no trace of JAX's."""
    return next((kind for suffix, kind in _OTHERS.items() if file.name.endswith(suffix)), "no trace")


def _check_one_program(traces: Mapping[str, Trace]) -> None:
    """Refuse traces of one folder that are not of the processes of one program."""
    ran = {name: trace.events for name, trace in traces.items() if trace.events}
    busiest = {name: busiest_module(events) for name, events in ran.items()}
    modules = {name: {event.module for event in events} for name, events in ran.items()}
    for first, second in combinations(ran, 2):
        apart = busiest[first] not in modules[second] and busiest[second] not in modules[first]
        if apart or _platform(ran[first]) != _platform(ran[second]):
            raise UserError(
                f"the {len(ran)} traces of one folder are of processes that ran no program together, such as "
                f"{first} and {second}: name one of the files"
            )


def _platform(events: Sequence[OpEvent]) -> str:
    return events[0].device.partition(":")[0]


def _with_estimate(profile: Profile, path: Path) -> Profile:
    plan = Plan.load(path)
    if plan.estimate is None:
        return profile
    if _sizes(plan.mesh) != _sizes(profile.mesh):
        note = "the run has gone on by another plan since; what this one was to cost is not known"
        return dataclasses.replace(profile, notes=(*profile.notes, note))
    notes = profile.notes
    if plan.topology.chip.nominal:
        notes += (
            "the estimate is for devices of nominal speed, since simulated ones have none of their own",
        )
    pipeline = pipeline_time(profile.operations, plan)
    return dataclasses.replace(profile, estimate=plan.estimate, pipeline=pipeline, notes=notes)


def _sizes(mesh: Mapping[str, int]) -> dict[str, int]:
    return {axis: size for axis, size in mesh.items() if size > 1}


def _processes(files: Sequence[Path]) -> dict[int, Path]:
    """Return the traces of one session by the number of their process.

    A run's own traces end in it (``host_3.xplane.pb``). Of others, whose hosts' names may end alike
    (``a_01``, ``b_01``), it is their place.
    """
    found = [re.search(r"_(\d+)\.xplane\.pb(?:\.gz)?$", file.name) for file in files]
    numbers = [int(match[1]) for match in found if match]
    if len(set(numbers)) < len(files):
        numbers = list(range(len(files)))
    return dict(zip(numbers, files, strict=True))
