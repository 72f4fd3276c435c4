"""Read an xplane file into plain records, whatever the device.

Where operations stand differs by platform:

- CPU: plane ``/host:CPU``, any thread: events with a ``hlo_op`` stat, ``device_ordinal`` and ``run_id``. An
  operation that finishes on another thread has an event ``end: <op>`` there, tied to it by a number.
- GPU: planes ``/device:GPU:n``, one line a stream: kernels, which `gpu` ties to executions.
- TPU: planes ``/device:TPU:n``, line ``XLA Ops``: events named by their HLO text; asynchronous spans on line
  ``Async XLA Ops``; whole executions, with ``run_id``, on line ``XLA Modules``.

A ``Steps`` line, where a device has one, holds steps that a viewer or the device itself made out.
"""

from __future__ import annotations

import gzip
import json
import re
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...sharding.errors import UserError
from .events import HostSpan, OpEvent, Trace, transfer_of
from .gpu import Kernel, place, read_kernels
from .held import held_modules
from .host import read_host
from .wire import fields

#: How the files of traces end.
SUFFIXES = (".xplane.pb", ".xplane.pb.gz")

_DEVICE = re.compile(r"^/device:(GPU|TPU):(\d+)$")
_SPARSE = re.compile(r"^/device:TPU:\d+ SparseCore \d+$")
# Fields of an XSpace beside its planes: what went wrong while it was captured.
_COMPLAINTS = (2, 3)


def read_xplane(path: Path) -> Trace:
    """Read one process's ``.xplane.pb``, or such a file packed by gzip.

    Raises:
        UserError: The file is truncated, damaged or empty, or several processes' in one.
    """
    with warnings.catch_warnings():
        # jaxlib's stat types name no module, which Python 3.12 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        planes, content = _planes(path)
        return trace_of_planes(planes, _complaints(content), held_modules(content))


def trace_of_planes(
    planes: Iterable[Any],
    complaints: Iterable[str] = (),
    programs: Mapping[str, bytes] = MappingProxyType({}),
) -> Trace:
    """Read planes as `jax.profiler.ProfileData` gives them: ``.name``, ``.lines`` → ``.name``, ``.events`` →
    ``.name``, ``.start_ns``, ``.duration_ns``, ``.stats`` (pairs).

    Args:
        planes: The planes of one process.
        complaints: What the profiler itself said of the trace, such as that it dropped events.
        programs: Serialised modules that the trace holds, by name and number.

    Raises:
        UserError: The planes are of several processes.
    """
    planes = list(planes)
    _check_one_process(planes)
    events: list[OpEvent] = []
    kernels: dict[str, list[Kernel]] = {}
    broken: dict[str, int] = {}
    device_steps: dict[str, tuple[HostSpan, ...]] = {}
    devices: list[str] = []
    sparse = [one for one in planes if _SPARSE.match(one.name) and any(True for _ in _events(one))]
    for plane in planes:
        match = _DEVICE.match(plane.name)
        if match is None:
            continue
        device = f"{match[1].lower()}:{match[2]}"
        devices.append(device)
        if match[1] == "TPU":
            found, broken[device] = _tpu_events(plane, device)
            events += found
        else:
            kernels[device], broken[device] = read_kernels(plane, device)
        if spans := _steps_line(plane):
            device_steps[device] = spans
    # A viewer puts the planes of calls (``/host:CUPTI``, ``/host:ROCTRACER``) into the CPU's.
    host = read_host(plane for plane in planes if plane.name.startswith("/host:"))
    placed = place(kernels, host)
    events += placed.events
    # A program's data may be made by JAX on the CPU: beside devices it is not what they did.
    beside = {event.module for event in host.events} if events else set[str]()
    if not events:
        events = host.events + ([] if devices else host.nameless)
    # The trace runs on a little while its writer begins: what the devices start then is not the window's.
    end_ns = max(host.closed, default=float("inf"))
    events = sorted((event for event in events if event.start_ns < end_ns), key=lambda event: event.start_ns)
    return Trace(
        events=tuple(events),
        steps=tuple(host.steps),
        waits=tuple(host.waits),
        device_steps=device_steps,
        launched_ns=placed.launched_ns,
        launched=placed.launched,
        devices=tuple(devices) or tuple(dict.fromkeys(event.device for event in events)),
        programs=programs,
        notes=(
            *(f"the profiler said: {words}" for words in complaints),
            *(
                [f"what the host's CPU computed beside the devices is left out: {', '.join(sorted(beside))}"]
                if beside
                else []
            ),
            *(
                [f"what SparseCores did beside the devices is left out ({len(sparse)} of them)"]
                if sparse
                else []
            ),
            *(
                f"{number} {'operations' if device.startswith('tpu') else 'kernels'} on {device} have times "
                "that cannot be, and are left out"
                for device, number in broken.items()
                if number
            ),
        ),
    )


def _check_one_process(planes: Iterable[Any]) -> None:
    """Refuse planes of several processes put into one file: their devices bear the same names."""
    ran = [plane.name for plane in planes if _DEVICE.match(plane.name) and any(True for _ in _events(plane))]
    twice = sorted({name for name in ran if ran.count(name) > 1})
    if twice:
        raise UserError(
            f"the trace holds {ran.count(twice[0])} planes of {twice[0]}: it was put together from several "
            "processes' traces, whose devices cannot be told apart; name the folder with a file of each"
        )


def _events(plane: Any) -> Iterable[Any]:
    return (event for line in plane.lines for event in line.events)


def _planes(path: Path) -> tuple[list[Any], bytes]:
    from jax.profiler import ProfileData

    content = path.read_bytes()
    sizes = path.with_name(path.name.removesuffix(".xplane.pb") + ".sizes.json")
    wanted = json.loads(sizes.read_text()).get(".xplane.pb") if sizes.exists() else None
    if wanted is not None and wanted != len(content):
        raise UserError(
            f"the trace {path} is truncated: {len(content)} of {wanted} bytes; capture the profile again"
        )
    try:
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
        planes = list(ProfileData.from_serialized_xspace(content).planes)
    except (RuntimeError, ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"the trace {path} is damaged: {error}; capture the profile again") from error
    if not planes:
        raise UserError(f"the trace {path} is empty ({len(content)} bytes); capture the profile again")
    return planes, content


def _complaints(content: bytes) -> list[str]:
    """Return the errors and warnings of a serialised XSpace."""
    return [
        value.decode(errors="replace")
        for number, value in fields(content)
        if number in _COMPLAINTS and isinstance(value, bytes)
    ]


def _steps_line(plane: Any) -> tuple[HostSpan, ...]:
    spans = [
        HostSpan(
            start_ns=event.start_ns,
            end_ns=event.start_ns + event.duration_ns,
            step=int(event.name) if event.name.isdigit() else None,
        )
        for event in _line(plane, "Steps")
    ]
    return tuple(sorted(spans, key=lambda span: span.start_ns))


def _line(plane: Any, name: str) -> list[Any]:
    return [event for line in plane.lines if line.name == name for event in line.events]


def _tpu_events(plane: Any, device: str) -> tuple[list[OpEvent], int]:
    """Return what a TPU ran, and of how many operations the times cannot be.

    These end before they begin, or long after the execution that they began in.
    """
    found: list[OpEvent] = []
    broken = 0
    runs: list[tuple[float, float, str, str, int]] = []
    for number, event in enumerate(_line(plane, "XLA Modules")):
        end_ns = event.start_ns + event.duration_ns
        name, _, program = event.name.partition("(")
        run = dict(event.stats).get("run_id", number)
        runs.append((event.start_ns, end_ns, name, program.removesuffix(")"), run))
    runs.sort()
    starts = [run[0] for run in runs]
    for line_name in ("XLA Ops", "Async XLA Ops"):
        for event in _line(plane, line_name):
            place_ = bisect_right(starts, event.start_ns) - 1
            inside = place_ >= 0 and event.start_ns <= runs[place_][1]
            longest = 2 * (runs[place_][1] - runs[place_][0]) if inside else event.duration_ns
            if event.duration_ns < 0 or (line_name == "XLA Ops" and event.duration_ns > longest):
                broken += 1
                continue
            found.append(
                OpEvent(
                    device=device,
                    line=line_name,
                    op=event.name.removeprefix("%").partition(" = ")[0],
                    module=runs[place_][2] if inside else "",
                    program=runs[place_][3] if inside else "",
                    run=runs[place_][4] if inside else None,
                    start_ns=event.start_ns,
                    end_ns=event.start_ns + event.duration_ns,
                    transfer=transfer_of(event.name),
                    role="flight" if line_name == "Async XLA Ops" else "run",
                )
            )
    return found, broken
