"""Which step each operation belongs to.

Devices run behind the host, so the time of an operation does not say its step. Its execution does, which the
host launched within a step, or which is the k-th of the step's program. Where nobody numbered the steps,
executions are the steps: those of the one program that takes nearly all of the time, or the groups in which
programs follow each other again and again. Where neither holds there are no steps, and none are made up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .events import HostSpan, OpEvent, Trace
from .repetition import numbered, period

# Of the devices' time, what one program takes for its executions to be the steps.
_ALONE = 0.9
# How far apart the busy times of groups may lie that are one step done again and again.
_ALIKE = 2.0


@dataclass(frozen=True, kw_only=True)
class StepWindow:
    """One step on one device.

    A numbered step goes from the end of the step before to the end of its own last operation. One that nobody
    numbered goes from its own first to its own last operation, and `gap_ns` is what passed before it.
    """

    step: int
    start_ns: float
    end_ns: float
    gap_ns: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FoundSteps:
    """The steps of one process's trace, by device; `notes` say how they were told, or why there are none."""

    windows: Mapping[str, tuple[StepWindow, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Execution:
    module: str
    run: int
    start_ns: float
    end_ns: float
    busy_ns: float
    operations: int


def busiest_module(events: Sequence[OpEvent]) -> str:
    """Return the program that most of the devices' time went to; empty where the trace names none."""
    seconds: Counter[str] = Counter()
    for (module, _), spent in _seconds(events).items():
        seconds[module] += spent
    return seconds.most_common(1)[0][0] if seconds else ""


def find_steps(trace: Trace, module: str, *, sure: bool = False) -> FoundSteps:
    """Divide the time of each device of a trace into steps.

    Args:
        trace: What one process recorded.
        module: The step's program; the busiest one, where no program was saved beside the trace.
        sure: Whether it is known to be the step's program.
    """
    own = events_by_device(trace)
    if trace.steps:
        found = {device: _numbered(events, module, trace) for device, events in own.items()}
        if any(found.values()):
            return FoundSteps(windows=found, notes=_uneven(found))
    if any(trace.device_steps.values()):
        windows = {device: _of_device(trace.device_steps.get(device, ())) for device in own}
        return FoundSteps(windows=windows, notes=("the steps are those of the trace's own lines of steps",))
    executions = {device: _executions(events) for device, events in own.items()}
    said = _cannot_number(trace, module, executions)
    if sure or _is_alone(trace.events, module):
        ours = {device: [e for e in each if e.module == module] for device, each in executions.items()}
        if any(ours.values()):
            groups = {device: [[execution] for execution in each] for device, each in ours.items()}
            how = f"nobody numbered the steps: each execution of {module} is one"
            return FoundSteps(windows=_grouped(groups), notes=(*said, how, *_uneven(ours)))
    return _in_groups(executions, said)


def events_by_device(trace: Trace) -> dict[str, list[OpEvent]]:
    """Return each device's operations, devices without any left out."""
    devices: dict[str, list[OpEvent]] = defaultdict(list)
    for event in trace.events:
        devices[event.device].append(event)
    return {device: own for device, own in devices.items() if not all(event.copy for event in own)}


def step_windows(events: Sequence[OpEvent], module: str, steps: Sequence[HostSpan]) -> tuple[StepWindow, ...]:
    """Divide one device's time into the host's numbered steps, by the order of executions.

    The windows adjoin, so that whatever happens between two steps (an evaluation, a wait) belongs to the
    later one. The first begins where the host began the step, for the device waited from then on.

    Args:
        events: One device's operations, in order of start.
        module: The step's program.
        steps: The host's numbered steps in order.

    Raises:
        ValueError: The executions found cannot be shared out among `steps`.
    """
    told = numbered(events, len(steps))
    spans = [(e.start_ns, e.end_ns) for e in _executions(told) if e.module == module]
    each, left = divmod(len(spans), len(steps))
    if left or not each:
        raise ValueError(f"{len(spans)} executions of {module!r} do not divide among {len(steps)} steps")
    ends = [spans[last][1] for last in range(each - 1, len(spans), each)]
    return _adjoining(dict(enumerate(ends)), steps, spans[0][0])


def _numbered(events: Sequence[OpEvent], module: str, trace: Trace) -> tuple[StepWindow, ...]:
    """Return the host's steps on one device: by when each execution was launched, else by their order."""
    launched = [e for e in _executions(events) if e.run in trace.launched_ns]
    if not launched:
        try:
            return step_windows(events, module, trace.steps)
        except ValueError:
            return ()
    starts = [span.start_ns for span in trace.steps]
    ends: dict[int, float] = {}
    for execution in launched:
        at_ns = trace.launched_ns[execution.run]
        place = bisect_right(starts, at_ns) - 1
        # A step's program may be launched by another thread, a little after the loop went on.
        if place >= 0 and (at_ns <= trace.steps[place].end_ns or execution.module == module):
            ends[place] = max(ends.get(place, 0.0), execution.end_ns)
    return _adjoining(ends, trace.steps, min(e.start_ns for e in launched))


def _adjoining(
    ends: Mapping[int, float], steps: Sequence[HostSpan], first_ns: float
) -> tuple[StepWindow, ...]:
    windows = []
    begin = None
    for place in sorted(ends):
        span = steps[place]
        begin = min(span.start_ns, first_ns) if begin is None else begin
        number = span.step if span.step is not None else place
        end = max(begin, ends[place])
        windows.append(StepWindow(step=number, start_ns=begin, end_ns=end))
        begin = end
    return tuple(windows)


def _of_device(spans: Sequence[HostSpan]) -> tuple[StepWindow, ...]:
    return _with_gaps(
        [(s.start_ns, s.end_ns, s.step if s.step is not None else k) for k, s in enumerate(spans)]
    )


def _with_gaps(spans: Sequence[tuple[float, float, int]]) -> tuple[StepWindow, ...]:
    windows = []
    before = None
    for start, end, number in spans:
        gap = max(start - before, 0.0) if before is not None else 0.0
        windows.append(StepWindow(step=number, start_ns=start, end_ns=end, gap_ns=gap))
        before = end
    return tuple(windows)


def _executions(events: Sequence[OpEvent]) -> list[_Execution]:
    """Return the executions of all programs on one device, in order of start."""
    runs: dict[tuple[str, int], list[OpEvent]] = defaultdict(list)
    for event in events:
        if event.run is not None and event.role != "flight":
            runs[event.module, event.run].append(event)
    found = [
        _Execution(
            module=module,
            run=run,
            start_ns=min(e.start_ns for e in own),
            end_ns=max(e.end_ns for e in own),
            busy_ns=busy_ns(own),
            operations=len(own),
        )
        for (module, run), own in runs.items()
    ]
    return sorted(found, key=lambda execution: execution.start_ns)


def busy_ns(events: Sequence[OpEvent]) -> float:
    """Return the time in which any of `events` ran."""
    total, end_ns = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start_ns):
        if event.end_ns > end_ns:
            total += event.end_ns - max(event.start_ns, end_ns)
            end_ns = event.end_ns
    return total


def _in_groups(executions: Mapping[str, Sequence[_Execution]], said: Sequence[str]) -> FoundSteps:
    """Return groups of executions that follow each other in one order as steps, if they take alike long."""
    groups: dict[str, list[list[_Execution]]] = {}
    for device, own in executions.items():
        length = period([(execution.module, execution.operations) for execution in own])
        if not own or 2 * length > len(own):
            why = f"the executions of {_programs(own)} repeat in no order" if own else "no execution is known"
            return FoundSteps(windows={}, notes=(*said, f"no steps: {why}"))
        groups[device] = [list(own[k : k + length]) for k in range(0, len(own) - length + 1, length)]
        busy = [sum(execution.busy_ns for execution in group) for group in groups[device]]
        if max(busy) > _ALIKE * min(busy):
            why = (
                f"{length} executions follow each other {len(busy)} times in one order, but take "
                f"{min(busy) / 1e6:.3f} to {max(busy) / 1e6:.3f} ms"
            )
            return FoundSteps(windows={}, notes=(*said, f"no steps: {why}"))
    if not groups:
        return FoundSteps(windows={}, notes=(*said, "no steps: no execution is known"))
    lengths = sorted({len(own[0]) for own in groups.values()})
    how = f"nobody numbered the steps: {' or '.join(map(str, lengths))} executions in their order are one"
    return FoundSteps(windows=_grouped(groups), notes=(*said, how, *_uneven(groups)))


def _programs(executions: Sequence[_Execution]) -> str:
    number = len({execution.module for execution in executions})
    return f"{number} programs" if number > 1 else executions[0].module or "a program"


def _grouped(groups: Mapping[str, Sequence[Sequence[_Execution]]]) -> dict[str, tuple[StepWindow, ...]]:
    return {
        device: _with_gaps(
            [
                (group[0].start_ns, max(execution.end_ns for execution in group), number)
                for number, group in enumerate(own)
            ]
        )
        for device, own in groups.items()
    }


def _uneven(counted: Mapping[str, Sequence[object]]) -> tuple[str, ...]:
    numbers = {device: len(own) for device, own in counted.items()}
    if len(set(numbers.values())) == 1:
        return ()
    most = max(numbers.values())
    fewer = ", ".join(f"{device} {number}" for device, number in numbers.items() if number < most)
    return (f"not every device has all {most} steps: {fewer}",)


def _cannot_number(
    trace: Trace, module: str, executions: Mapping[str, Sequence[_Execution]]
) -> tuple[str, ...]:
    if not trace.steps:
        return ()
    counts = sorted({sum(e.module == module for e in own) for own in executions.values()})
    found = " or ".join(map(str, counts)) or "0"
    return (f"the host numbered {len(trace.steps)} steps, which {found} executions of {module} are not",)


def _is_alone(events: Sequence[OpEvent], module: str) -> bool:
    """Tell whether one program takes nearly all of the time, and not several that share its name."""
    seconds = _seconds(events)
    return any(
        name == module and spent > _ALONE * sum(seconds.values()) for (name, _), spent in seconds.items()
    )


def _seconds(events: Sequence[OpEvent]) -> Counter[tuple[str, str]]:
    seconds: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.role == "run" and event.module:
            seconds[event.module, event.program] += event.end_ns - event.start_ns  # pyright: ignore[reportArgumentType]
    return seconds
