"""From traces and the program they ran to a `Profile`."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby

from ...sharding.errors import UserError
from .account import Ledger, account
from .annotations import with_one_kind_of_steps
from .events import OpEvent, Trace
from .executions import busiest_module, events_by_device, find_steps
from .held import Programs
from .operations import OpReader
from .profile import CollectiveTime, HostStep, Profile, ProgramTime, StepTime
from .program import SavedProgram
from .repetition import with_executions
from .steps import FoundSteps, StepWindow, busy_ns

_CPU_NOTE = (
    "simulated devices share this machine's cores: much of a collective's time is waiting for other devices"
)
_NO_PROGRAM_NOTE = "no program was saved beside the trace, so mesh axes and source lines are unknown"
_HELD_NOTE = (
    "the program is the trace's own, which says of collectives how many devices take part and not along "
    "which mesh axes"
)
_COMMAND_BUFFERS_NOTE = (
    "operations in command buffers bear the name of the whole buffer: they are told by their kernels"
)


def analyse(traces: Mapping[int, Trace], program: SavedProgram | None, files: Sequence[str] = ()) -> Profile:
    """Account for every step on every device.

    Args:
        traces: What each process recorded, by process number.
        program: The step's program and mesh; without it collectives are told by name and have no axes.
        files: The traces' files, for the record.

    Raises:
        UserError: The traces hold no operation, or none of the saved program.
    """
    traces = {process: _understood(trace, program) for process, trace in traces.items()}
    events = [event for trace in traces.values() for event in trace.events]
    if not events:
        raise UserError(
            "the trace holds no operation of any device: no step ran while it was captured, or on a CPU the "
            "host tracer was off"
        )
    module = _step_module(events, program)
    notes = [_CPU_NOTE] if events[0].device.startswith("cpu") else []
    programs = Programs(program, [trace.programs for trace in traces.values()])
    if program is None:
        own = next((event for event in events if event.module == module and not event.copy), events[0])
        notes += [_NO_PROGRAM_NOTE if programs.of(own) is None else _HELD_NOTE]
    notes += [_COMMAND_BUFFERS_NOTE] if any(e.op.startswith("command_buffer") for e in events) else []
    steps = {
        process: find_steps(trace, module, sure=program is not None) for process, trace in traces.items()
    }
    has_steps = any(windows for found in steps.values() for windows in found.windows.values())
    reader = OpReader(programs, module if has_steps else "")
    times: list[StepTime] = []
    ledgers: list[Ledger] = []
    for process, trace in traces.items():
        windows = steps[process].windows if has_steps else _whole(trace)
        for device, own in events_by_device(trace).items():
            # Only a CPU's devices are numbered across processes.
            name = device if device.startswith("cpu") or len(traces) == 1 else f"process {process} {device}"
            # Events before `first` have all ended before a window: of long traces each sees a part.
            starts = [event.start_ns for event in own]
            ended = list(accumulate((event.end_ns for event in own), max))
            for window in windows.get(device, ()):
                first = bisect_left(ended, window.start_ns)
                ledger = account(
                    own[first : bisect_left(starts, window.end_ns)],
                    window,
                    trace.waits,
                    reader.collective_of,
                    reader.is_container,
                    reader.is_copy,
                    reader.name,
                )
                ledgers.append(ledger)
                times.append(_step_time(window, name, ledger))
    if not times:
        raise UserError(
            "the trace holds transfers alone, and no operation of any program: no step ran on a device while "
            "it was captured"
        )
    notes += _said(traces, steps)
    times.sort(key=lambda time: (time.step, _device_order(time.device)))
    return Profile(
        platform=events[0].device.partition(":")[0],
        module=module if has_steps else "",
        mesh=dict(program.mesh) if program is not None else {},
        files=tuple(files),
        steps=tuple(times) if has_steps else (),
        whole=() if has_steps else tuple(times),
        host_steps=tuple(step for process, trace in traces.items() for step in _host_steps(process, trace)),
        operations=reader.operations(ledgers, sum(time.wall_seconds for time in times)),
        notes=tuple(dict.fromkeys(notes)),
        programs=_programs(traces),
        placed=_placed(traces, steps),
    )


def _understood(trace: Trace, program: SavedProgram | None) -> Trace:
    """Return a trace with its executions known, and its steps those of one kind."""
    trace = with_executions(trace)
    module = program.program.name if program is not None else busiest_module(trace.events)
    return with_one_kind_of_steps(trace, module)


def _step_module(events: Sequence[OpEvent], program: SavedProgram | None) -> str:
    module = busiest_module(events)
    if program is None:
        return module
    if any(event.module == program.program.name for event in events):
        return program.program.name
    raise UserError(
        f"the saved program is {program.program.name!r}, but the trace holds {module!r}: "
        "capture the profile again"
    )


def _whole(trace: Trace) -> dict[str, tuple[StepWindow, ...]]:
    """Return one window a device, from its first to its last operation of any program."""
    found = {}
    for device, events in events_by_device(trace).items():
        own = [event for event in events if not event.copy]
        end_ns = max(event.end_ns for event in own)
        found[device] = (StepWindow(step=-1, start_ns=own[0].start_ns, end_ns=end_ns),)
    return found


def _programs(traces: Mapping[int, Trace]) -> tuple[ProgramTime, ...]:
    """Return what ran, program by program, over all processes and devices."""
    found: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    for trace in traces.values():
        for events in events_by_device(trace).values():
            own = sorted((e for e in events if not e.copy and e.role == "run"), key=lambda e: e.module)
            for module, ran in groupby(own, key=lambda event: event.module):
                each = list(ran)
                runs = len({event.run for event in each if event.run is not None})
                found[module].append((runs, len(each), busy_ns(each) / 1e9))
    programs = [
        ProgramTime(
            module=module,
            executions=sum(runs for runs, _, _ in each),
            operations=sum(count for _, count, _ in each),
            busy_seconds=sum(busy for _, _, busy in each),
        )
        for module, each in found.items()
    ]
    return tuple(sorted(programs, key=lambda program: -program.busy_seconds))


def _said(traces: Mapping[int, Trace], steps: Mapping[int, FoundSteps]) -> Iterator[str]:
    """Yield what is to be said of each process's trace, with its processes where it holds for some alone."""
    processes: dict[str, list[int]] = defaultdict(list)
    for process, trace in traces.items():
        # Of a process whose devices ran nothing there are no steps to speak of.
        for note in (*trace.notes, *_missing(trace), *(steps[process].notes if trace.events else ())):
            processes[note].append(process)
    for note, those in processes.items():
        several = f"process{'es' * (len(those) > 1)} {', '.join(map(str, those))}"
        yield note if len(those) == len(traces) else f"{several}: {note}"
    counts = {
        process: max(map(len, found.windows.values()), default=0)
        for process, found in steps.items()
        if traces[process].events
    }
    most = max(counts.values(), default=0)
    if fewer := [f"process {process} {count}" for process, count in counts.items() if count < most]:
        yield f"not every process has all {most} steps: {', '.join(fewer)}"


def _missing(trace: Trace) -> Iterator[str]:
    """Yield what the host launched and the trace does not hold, and devices that ran nothing."""
    found = Counter(
        module for module, _, _ in {(e.module, e.device, e.run) for e in trace.events if e.run is not None}
    )
    for module, counts in trace.launched.items():
        if found[module] < sum(counts):
            yield (
                f"the trace is incomplete: the host launched {sum(counts)} executions of "
                f"{module or 'a program'}, and it holds operations of {found[module] or 'none of them'}"
            )
    placed = {event.module for event in trace.events if event.run is not None}
    lost = Counter(e.module for e in trace.events if e.run is None and not e.copy and e.role == "run")
    for module, number in lost.items():
        if module and module in placed:
            yield (
                f"{number} operations of {module} are of no known execution, since the trace lacks what "
                "launched them: steps may lack them, too"
            )
    ran = events_by_device(trace)
    if empty := [device for device in trace.devices if device not in ran]:
        yield f"no operations on {', '.join(empty)}"


def _placed(traces: Mapping[int, Trace], steps: Mapping[int, FoundSteps]) -> tuple[int, int]:
    placed = total = 0
    for process, trace in traces.items():
        for device, events in events_by_device(trace).items():
            spans = [(w.start_ns, w.end_ns) for w in steps[process].windows.get(device, ())]
            for event in events:
                if event.copy or event.role != "run":
                    continue
                total += 1
                placed += event.run is not None or any(start <= event.start_ns < end for start, end in spans)
    return placed, total


def _device_order(device: str) -> tuple[str, int]:
    platform, _, number = device.rpartition(":")
    return platform, int(number)


def _step_time(window: StepWindow, device: str, ledger: Ledger) -> StepTime:
    keys = dict.fromkeys([*ledger.collective_counts, *ledger.exposed_ns, *ledger.overlapped_ns])
    collectives = [
        CollectiveTime(
            kind=key[0],
            axes=key[1],
            count=ledger.collective_counts.get(key, 0),
            exposed_seconds=ledger.exposed_ns.get(key, 0.0) / 1e9,
            overlapped_seconds=ledger.overlapped_ns.get(key, 0.0) / 1e9,
        )
        for key in keys
    ]
    return StepTime(
        step=window.step,
        device=device,
        wall_seconds=(window.end_ns - window.start_ns) / 1e9,
        compute_seconds=ledger.compute_ns / 1e9,
        collectives=tuple(collectives),
        copy_seconds=ledger.copy_ns / 1e9,
        data_wait_seconds=ledger.data_wait_ns / 1e9,
        idle_seconds=ledger.idle_ns / 1e9,
        gap_seconds=window.gap_ns / 1e9,
    )


def _host_steps(process: int, trace: Trace) -> list[HostStep]:
    steps = []
    for span in trace.steps:
        waits = [min(w.end_ns, span.end_ns) - max(w.start_ns, span.start_ns) for w in trace.waits]
        steps.append(
            HostStep(
                process=process,
                step=span.step if span.step is not None else len(steps),
                wall_seconds=(span.end_ns - span.start_ns) / 1e9,
                data_wait_seconds=sum(wait for wait in waits if wait > 0) / 1e9,
            )
        )
    return steps
