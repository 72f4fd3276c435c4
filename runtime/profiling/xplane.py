"""Read an xplane file into plain records, whatever the device.

Where operations stand differs by platform:

- CPU: plane ``/host:CPU``, any thread: events with a ``hlo_op`` stat, ``device_ordinal`` and ``run_id``. An
  operation that finishes on another thread has an event ``end: <op>`` there, tied to it by a number.
- GPU: planes ``/device:GPU:n``, one line a stream: kernels with a ``hlo_op`` stat, without a run number.
- TPU: planes ``/device:TPU:n``, line ``XLA Ops``: events named by their HLO text; asynchronous spans on line
  ``Async XLA Ops``; whole executions, with ``run_id``, on line ``XLA Modules``.
"""

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...sharding.errors import UserError
from .events import HostSpan, OpEvent, Trace
from .window import DATA_WAIT, WINDOW

# Bookkeeping of XLA's thread pools: most of a CPU trace's events, and never an operation.
_NOISE = ("ThreadpoolListener::", "Wait", "Rendezvous", "InvokeRendezvous")
_DEVICE = re.compile(r"^/device:(GPU|TPU):(\d+)$")


def read_xplane(path: Path) -> Trace:
    """Read one process's ``.xplane.pb``.

    Raises:
        UserError: The file is truncated, damaged or empty.
    """
    with warnings.catch_warnings():
        # jaxlib's stat types name no module, which Python 3.12 deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        return trace_of_planes(_planes(path))


def trace_of_planes(planes: Iterable[Any]) -> Trace:
    """Read planes as `jax.profiler.ProfileData` gives them: ``.name``, ``.lines`` → ``.name``, ``.events`` →
    ``.name``, ``.start_ns``, ``.duration_ns``, ``.stats`` (pairs).
    """
    events: list[OpEvent] = []
    steps: list[HostSpan] = []
    waits: list[HostSpan] = []
    closed: list[float] = []
    for plane in planes:
        device = _DEVICE.match(plane.name)
        if device is not None and device[1] == "TPU":
            events += _tpu_events(plane, f"tpu:{device[2]}")
        elif device is not None:
            events += _gpu_events(plane, f"gpu:{device[2]}")
        elif plane.name.startswith("/host:CPU"):
            _read_host(plane, events, steps, waits, closed)
    steps.sort(key=lambda span: span.start_ns)
    waits.sort(key=lambda span: span.start_ns)
    # The trace runs on a little while its writer begins: what the devices start then is not the window's.
    end_ns = max(closed, default=float("inf"))
    events = sorted((event for event in events if event.start_ns < end_ns), key=lambda event: event.start_ns)
    return Trace(events=tuple(events), steps=tuple(steps), waits=tuple(waits))


def _planes(path: Path) -> list[Any]:
    from jax.profiler import ProfileData

    content = path.read_bytes()
    sizes = path.with_name(path.name.removesuffix(".xplane.pb") + ".sizes.json")
    wanted = json.loads(sizes.read_text()).get(".xplane.pb") if sizes.exists() else None
    if wanted is not None and wanted != len(content):
        raise UserError(
            f"the trace {path} is truncated: {len(content)} of {wanted} bytes; capture the profile again"
        )
    try:
        planes = list(ProfileData.from_serialized_xspace(content).planes)
    except RuntimeError as error:
        raise UserError(f"the trace {path} is damaged: {error}; capture the profile again") from error
    if not planes:
        raise UserError(f"the trace {path} is empty ({len(content)} bytes); capture the profile again")
    return planes


def _stats(event: Any) -> dict[str, Any]:
    return dict(event.stats)


def _read_host(
    plane: Any,
    events: list[OpEvent],
    steps: list[HostSpan],
    waits: list[HostSpan],
    closed: list[float],
) -> None:
    found: list[tuple[OpEvent, int | None]] = []
    finished: dict[int, float] = {}
    for number, line in enumerate(plane.lines):
        name = f"{line.name}#{number}"
        for event in line.events:
            if event.name.startswith(_NOISE):
                continue
            stats = _stats(event)
            end_ns = event.start_ns + event.duration_ns
            if event.name.startswith("end: "):
                finished[stats.get("_c", -1)] = event.start_ns
            elif "hlo_op" in stats and "device_ordinal" in stats:
                op = OpEvent(
                    device=f"cpu:{stats['device_ordinal']}",
                    line=name,
                    op=str(stats["hlo_op"]),
                    module=str(stats.get("hlo_module", "")),
                    run=stats.get("run_id"),
                    start_ns=event.start_ns,
                    end_ns=end_ns,
                )
                found.append((op, stats.get("_p")))
            elif "step_num" in stats:
                steps.append(HostSpan(start_ns=event.start_ns, end_ns=end_ns, step=int(stats["step_num"])))
            elif event.name == DATA_WAIT:
                waits.append(HostSpan(start_ns=event.start_ns, end_ns=end_ns))
            elif event.name == WINDOW:
                closed.append(end_ns)
    events += _finish(found, finished)


def _finish(found: list[tuple[OpEvent, int | None]], finished: dict[int, float]) -> Iterable[OpEvent]:
    """Yield CPU operations, and for one that its thread let go of unfinished, what it still ran elsewhere.

    The `end:` event comes only after all that waited for the operation has run too, so what the operation
    itself still ran lasts at most until the device's next operation begins.
    """
    starts: dict[str, list[float]] = {}
    for event, _ in found:
        starts.setdefault(event.device, []).append(event.start_ns)
    for times in starts.values():
        times.sort()
    for event, flow in found:
        yield event
        times = starts[event.device]
        following = bisect_left(times, event.end_ns)
        end_ns = finished.get(flow, 0.0) if flow is not None else 0.0
        if following < len(times):
            end_ns = min(end_ns, times[following])
        if end_ns > event.end_ns and not event.op.startswith(("while", "call", "conditional")):
            yield replace(event, start_ns=event.end_ns, end_ns=end_ns, role="rest")


def _gpu_events(plane: Any, device: str) -> Iterable[OpEvent]:
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            stats = _stats(event)
            if "hlo_op" not in stats and event.name.startswith(("Memcpy", "Memset")):
                continue  # a transfer that no operation of the program asked for, such as the next batch
            yield OpEvent(
                device=device,
                line=line.name,
                op=str(stats.get("hlo_op", event.name)),
                module=str(stats.get("hlo_module", "")),
                run=stats.get("run_id"),
                start_ns=event.start_ns,
                end_ns=event.start_ns + event.duration_ns,
            )


def _tpu_events(plane: Any, device: str) -> Iterable[OpEvent]:
    lines = {line.name: line for line in plane.lines}
    runs: list[tuple[float, float, str, int]] = []
    for number, event in enumerate(lines["XLA Modules"].events if "XLA Modules" in lines else ()):
        end_ns = event.start_ns + event.duration_ns
        name = re.sub(r"\(\d+\)$", "", event.name)
        runs.append((event.start_ns, end_ns, name, _stats(event).get("run_id", number)))
    runs.sort()
    starts = [run[0] for run in runs]
    for line_name in ("XLA Ops", "Async XLA Ops"):
        for event in lines[line_name].events if line_name in lines else ():
            place = bisect_right(starts, event.start_ns) - 1
            inside = place >= 0 and event.start_ns <= runs[place][1]
            yield OpEvent(
                device=device,
                line=line_name,
                op=event.name.removeprefix("%").partition(" = ")[0],
                module=runs[place][2] if inside else "",
                run=runs[place][3] if inside else None,
                start_ns=event.start_ns,
                end_ns=event.start_ns + event.duration_ns,
                role="flight" if line_name == "Async XLA Ops" else "run",
            )
