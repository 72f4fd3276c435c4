"""Kernels of a GPU plane, placed: kernel → launch → execution.

A GPU's streams know their kernels' programs and never the execution. What ties them to one is the number that
a kernel shares with the call that launched it, and the host's span of the execution that the call stands in.
Kernels whose launch says nothing (dropped, or a number that points at a copy) belong to the execution whose
kernels lie around them. Where a trace holds no launches at all, `repetition` tells executions.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...sharding.hlo.text import COLLECTIVES
from .events import OpEvent
from .host import HostExecution, HostRecord, KernelLaunch

# Transfers by CUPTI's and by older ROCm's names, and the kernels that newer ROCm makes them with.
_TRANSFER = re.compile(r"^(Memcpy|Memset|Copy(Host|Device|Array)\w*To|Fill)")
_ROCM_TRANSFER = re.compile(r"^__amd_rocclr_(copy|fill)")
# Transfers between a program's host and device memory, beside which it goes on.
_OFFLOAD = re.compile(r"^Memcpy(H2D|D2H|HtoD|DtoH|P2P|PtoP)")
_COLLECTIVES = tuple(COLLECTIVES)
_COMMAND_BUFFER = "command_buffer"
# Calls that move or set bytes and launch no kernel of a program.
_MOVES = re.compile(r"(?i)mem(cpy|set)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """An event of a stream, with the number of the call that launched it."""

    event: OpEvent
    correlation: int | None


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Events with their executions (`OpEvent.run`); when each was launched, and how many on each device."""

    events: list[OpEvent]
    launched_ns: dict[int, float]
    launched: dict[str, tuple[int, ...]]


def read_kernels(plane: Any, device: str) -> tuple[list[Kernel], int]:
    """Return what the streams of a plane ran, and of how many kernels the times cannot be.

    Lines that a viewer derived from streams are left out, and so are kernels that ended before they began, or
    took longer than all of their stream while others of it ran.
    """
    kernels: list[Kernel] = []
    broken = 0
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        events = list(line.events)
        starts = sorted(event.start_ns for event in events)
        for event in events:
            stats = dict(event.stats)
            correlation = stats.get("correlation_id")
            later = len(starts) - bisect_right(starts, event.start_ns)
            if event.duration_ns < 0 or (later > 1 and event.duration_ns > 2 * (starts[-1] - starts[0])):
                broken += 1
                continue
            kernels.append(
                Kernel(
                    event=_event(event, stats, device, line.name),
                    correlation=int(correlation) if correlation is not None else None,
                )
            )
    return kernels, broken


def _event(event: Any, stats: Mapping[str, Any], device: str, line: str) -> OpEvent:
    op = str(stats.get("hlo_op", ""))
    # Graphs that were made before the trace began bear one name for all of their kernels.
    named = f"{op}: {event.name}" if op.startswith(_COMMAND_BUFFER) else op or event.name
    return OpEvent(
        device=device,
        line=line,
        op=named,
        module=str(stats.get("hlo_module", "")),
        program=str(stats.get("program_id", "")),
        run=None,
        start_ns=event.start_ns,
        end_ns=event.start_ns + event.duration_ns,
        kernel=event.name,
        copy=_is_copy(event.name, op, stats),
    )


def _is_copy(name: str, op: str, stats: Mapping[str, Any]) -> bool:
    """Tell transfers; those within the device's memory that a program asked for are its operations."""
    transfer = _TRANSFER.match(name) is not None or "memcpy_details" in stats or "memset_details" in stats
    if op.startswith(_COLLECTIVES):
        return False  # copy engines carry it out
    if not op:
        return transfer or _ROCM_TRANSFER.match(name) is not None
    return transfer and (_OFFLOAD.match(name) is not None or op.startswith(("copy-start", "copy-done")))


def place(kernels: Mapping[str, Sequence[Kernel]], host: HostRecord) -> Placed:
    """Give every kernel of every device its execution, as far as launches tell.

    Args:
        kernels: What each device's streams ran, by device.
        host: The host's executions, launches and steps.
    """
    events: list[OpEvent] = []
    launched_ns: dict[int, float] = {}
    for device, own in kernels.items():
        own = sorted(own, key=lambda kernel: kernel.event.start_ns)
        runs = _by_launch(own, int(device.partition(":")[2]), host)
        launched_ns |= {run: host.executions[run].start_ns for run in runs if run is not None}
        placed = [
            kernel.event
            if run is None
            else replace(kernel.event, run=run, module=kernel.event.module or host.executions[run].module)
            for kernel, run in zip(own, runs, strict=True)
        ]
        events += _named(placed)
    return Placed(events=events, launched_ns=launched_ns, launched=_launched(host, events))


def _launched(host: HostRecord, events: Sequence[OpEvent]) -> dict[str, tuple[int, ...]]:
    """Return how many executions of each program the host launched on each device, or from each thread."""
    found: dict[str, Counter[str | int]] = defaultdict(Counter)
    ran = {event.run: event.module for event in events if event.run is not None}
    for place_, execution in enumerate(host.executions):
        on = execution.line if execution.ordinal is None else execution.ordinal
        found[execution.module or ran.get(place_, "")][on] += 1
    return {module: tuple(counts.values()) for module, counts in found.items()}


def _by_launch(kernels: Sequence[Kernel], ordinal: int, host: HostRecord) -> list[int | None]:
    """Return the place in `host.executions` of each kernel's execution."""
    lines: dict[str, list[int]] = defaultdict(list)
    for place_, execution in enumerate(host.executions):
        if execution.ordinal in (None, ordinal):
            lines[execution.line].append(place_)
    starts = {line: [host.executions[k].start_ns for k in places] for line, places in lines.items()}

    def execution_at(line: str, at_ns: float, module: str) -> int | None:
        place_ = bisect_right(starts[line], at_ns) - 1
        if place_ < 0:
            return None
        execution = host.executions[lines[line][place_]]
        fits = at_ns <= execution.end_ns and _fits(module, execution.module)
        return lines[line][place_] if fits else None

    threads: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for number, kernel in enumerate(kernels):
        launch = host.launches.get(kernel.correlation) if kernel.correlation is not None else None
        if launch is not None and (kernel.event.module or not _moves(kernel, launch)):
            threads[launch.line].append((number, launch.at_ns))
    found: list[int | None] = [None] * len(kernels)
    for launched in threads.values():
        # A launch's thread and the thread of its execution bear different names: pair them by what they hold.
        by_line = {
            line: [execution_at(line, at, kernels[number].event.module) for number, at in launched]
            for line in lines
        }
        best = max(by_line.values(), key=lambda runs: sum(run is not None for run in runs), default=[])
        for (number, _), run in zip(launched, best, strict=False):
            found[number] = run
    # The number of a kernel that names no program may be another call's: what lies around it is surer.
    named = [run if kernel.event.module else None for kernel, run in zip(kernels, found, strict=True)]
    runs = _between(kernels, named, host.executions)
    return [call if run is None else run for run, call in zip(runs, found, strict=True)]


def _fits(module: str, launched: str) -> bool:
    """Tell whether a kernel of `module` may be of an execution of `launched`; either may be unknown."""
    return not module or not launched or module == launched


def _moves(kernel: Kernel, launch: KernelLaunch) -> bool:
    return kernel.event.copy or _MOVES.search(launch.name) is not None


def _between(
    kernels: Sequence[Kernel], runs: list[int | None], executions: Sequence[HostExecution]
) -> list[int | None]:
    """Give kernels without a usable launch to the one execution whose kernels lie around them.

    On the kernel's own stream first, and on all of the device's where the stream has none.
    """
    extents: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for kernel, run in zip(kernels, runs, strict=True):
        if run is None:
            continue
        for line in (kernel.event.line, ""):
            extent = extents[line].setdefault(run, [kernel.event.start_ns, kernel.event.end_ns])
            extent[0] = min(extent[0], kernel.event.start_ns)
            extent[1] = max(extent[1], kernel.event.end_ns)
    filled = list(runs)
    for number, kernel in enumerate(kernels):
        if runs[number] is not None or kernel.event.copy:
            continue
        for line in (kernel.event.line, ""):
            around = [
                run
                for run, (start, end) in extents[line].items()
                if start <= kernel.event.start_ns <= end
                and _fits(kernel.event.module, executions[run].module)
            ]
            if len(around) == 1:
                filled[number] = around[0]
                break
    return filled


def _named(events: list[OpEvent]) -> list[OpEvent]:
    """Name kernels that lost their operation's name after the same kernels of their program that have it."""
    known: dict[tuple[str, str], set[str]] = defaultdict(set)
    for event in events:
        if event.op != event.kernel:
            known[event.module, event.kernel].add(event.op)
    return [
        replace(event, op=next(iter(names)))
        if event.op == event.kernel and len(names := known.get((event.module, event.kernel), set())) == 1
        else event
        for event in events
    ]
