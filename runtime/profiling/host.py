"""What a trace's host plane says: a CPU's operations, numbered steps, waits, and what was launched when."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from .events import HostSpan, OpEvent
from .window import DATA_WAIT, WINDOW

# Bookkeeping of XLA's thread pools: most of a CPU trace's events, and never an operation.
_NOISE = ("ThreadpoolListener::", "Wait", "Rendezvous", "InvokeRendezvous", "PythonRefManager::", "$")
# One execution of a program on one GPU, as XLA's executor marks it; the ordinal came after JAX 0.8.
_THUNKS = re.compile(r"^(?:\[(\d+)\] )?GpuExecutable::ExecuteThunks$")
# The same by the module's own mark, which is all that JAX 0.6 has.
_MODULE = re.compile(r"^(.+):XLA GPU module$")


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelLaunch:
    """A call that put a kernel, a graph of kernels or a copy on a GPU's stream, and the host's thread."""

    name: str
    line: str
    at_ns: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HostExecution:
    """The host's span of launching one execution of `module`; `ordinal` is the GPU's, where it is said."""

    module: str
    line: str
    ordinal: int | None
    start_ns: float
    end_ns: float


@dataclass(kw_only=True)
class HostRecord:
    """All that was read of the host; `nameless` are operations that say no device, as older CPUs' do."""

    events: list[OpEvent] = field(default_factory=list)
    nameless: list[OpEvent] = field(default_factory=list)
    steps: list[HostSpan] = field(default_factory=list)
    waits: list[HostSpan] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)
    executions: list[HostExecution] = field(default_factory=list)
    launches: dict[int, KernelLaunch] = field(default_factory=dict)


def read_host(planes: Iterable[Any]) -> HostRecord:
    """Read the host planes of a trace."""
    record = HostRecord()
    found: list[tuple[OpEvent, int | None]] = []
    finished: dict[int, float] = {}
    modules: list[HostExecution] = []
    number = 0
    for plane in planes:
        for line in plane.lines:
            number += 1
            name = f"{line.name}#{number}"
            for event in line.events:
                if not event.name.startswith(_NOISE):
                    _read(event, name, record, found, finished, modules)
    record.events += _finish(found, finished)
    # Both marks stand around one execution where the newer one is there at all.
    record.executions = record.executions or modules
    record.executions.sort(key=lambda execution: execution.start_ns)
    record.steps.sort(key=lambda span: span.start_ns)
    record.waits.sort(key=lambda span: span.start_ns)
    return record


def _read(
    event: Any,
    line: str,
    record: HostRecord,
    found: list[tuple[OpEvent, int | None]],
    finished: dict[int, float],
    modules: list[HostExecution],
) -> None:
    stats = dict(event.stats)
    start_ns, end_ns = event.start_ns, event.start_ns + event.duration_ns
    if event.name.startswith("end: "):
        finished[stats.get("_c", -1)] = start_ns
    elif "correlation_id" in stats:
        record.launches[int(stats["correlation_id"])] = KernelLaunch(
            name=event.name, line=line, at_ns=start_ns
        )
    elif "hlo_op" in stats:
        op = OpEvent(
            device=f"cpu:{stats.get('device_ordinal', 0)}",
            line=line,
            op=str(stats["hlo_op"]),
            module=str(stats.get("hlo_module", "")),
            program=str(stats.get("program_id", "")),
            run=stats.get("run_id"),
            start_ns=start_ns,
            end_ns=end_ns,
        )
        if "device_ordinal" in stats:
            found.append((op, stats.get("_p")))
        else:
            record.nameless.append(op)
    elif "step_num" in stats:
        step = _number(stats["step_num"])
        record.steps.append(HostSpan(start_ns=start_ns, end_ns=end_ns, step=step, name=event.name))
    elif event.name == DATA_WAIT:
        record.waits.append(HostSpan(start_ns=start_ns, end_ns=end_ns))
    elif event.name == WINDOW:
        record.closed.append(end_ns)
    elif (match := _THUNKS.match(event.name)) is not None:
        ordinal = int(match[1]) if match[1] is not None else None
        record.executions.append(
            HostExecution(
                module=str(stats.get("module_name", "")),
                line=line,
                ordinal=ordinal,
                start_ns=start_ns,
                end_ns=end_ns,
            )
        )
    elif (match := _MODULE.match(event.name)) is not None:
        modules.append(
            HostExecution(module=match[1], line=line, ordinal=None, start_ns=start_ns, end_ns=end_ns)
        )


def _number(value: Any) -> int | None:
    try:
        return int(value)
    except ValueError:
        return None


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
