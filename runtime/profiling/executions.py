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
from dataclasses import replace

from .events import HostSpan, OpEvent, Trace
from .groups import in_groups
from .repetition import numbered
from .steps import DeviceExecution, FoundSteps, StepWindow, executions_of, grouped, uneven, with_gaps

# Of the devices' time, what one program takes for its executions to be the steps.
_ALONE = 0.9
# How long after its launch a kernel of an idle device begins at most; microseconds are usual.
_LATEST_NS = 20e6


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
            kept = {device: _uncut(own[device], module, each) for device, each in found.items()}
            late = {device: _late(events, trace) for device, events in own.items() if found[device]}
            notes = (
                *_said_late(late),
                *_cut_steps(found, kept),
                *uneven(found),
                *_of_others(own, module, kept),
            )
            return FoundSteps(windows=kept, notes=notes)
    if any(trace.device_steps.values()):
        windows = {device: _of_device(trace.device_steps.get(device, ())) for device in own}
        how = "the steps are those of the trace's own lines of steps"
        return FoundSteps(windows=windows, notes=(how, *uneven(windows)))
    executions = {device: executions_of(events) for device, events in own.items()}
    said = _cannot_number(trace, module, executions)
    if sure or _is_alone(trace.events, module):
        ours = {device: [e for e in each if e.module == module] for device, each in executions.items()}
        if any(ours.values()):
            whole = {device: _whole(each) for device, each in ours.items()}
            groups = {device: [[execution] for execution in each] for device, each in whole.items()}
            how = f"nobody numbered the steps: each execution of {module} is one"
            return FoundSteps(windows=grouped(groups), notes=(*said, how, *_cut(ours, whole), *uneven(whole)))
    return in_groups(executions, said)


def events_by_device(trace: Trace) -> dict[str, list[OpEvent]]:
    """Return each device's operations, devices without any left out."""
    devices: dict[str, list[OpEvent]] = defaultdict(list)
    for event in trace.events:
        devices[event.device].append(event)
    return {device: own for device, own in devices.items() if not all(event.copy for event in own)}


def step_windows(events: Sequence[OpEvent], module: str, steps: Sequence[HostSpan]) -> tuple[StepWindow, ...]:
    """Divide one device's time into the host's numbered steps, by the order of executions.

    The windows adjoin, so that whatever happens between two steps (an evaluation, a wait) belongs to the
    later one. The first begins where the host began the step, for the device waited from then on, or where
    the device had done what came before.

    Args:
        events: One device's operations, in order of start.
        module: The step's program.
        steps: The host's numbered steps in order.

    Raises:
        ValueError: The executions found cannot be shared out among `steps`, or are of steps before these: a
            device that lags behind the host runs them first.
    """
    told = numbered(events, len(steps))
    spans = [(e.start_ns, e.end_ns) for e in executions_of(told) if e.module == module]
    each, left = divmod(len(spans), len(steps))
    if left or not each:
        raise ValueError(f"{len(spans)} executions of {module!r} do not divide among {len(steps)} steps")
    for span, (start, end) in zip(steps, spans[::each], strict=True):
        # Clocks of host and device may differ by a little.
        if start < span.start_ns - (end - start) / 2.0:
            raise ValueError(f"an execution of {module!r} began before the host began its step")
    ends = [spans[last][1] for last in range(each - 1, len(spans), each)]
    return _adjoining(dict(enumerate(ends)), steps, spans[0][0], _before(events, spans[0][0]))


def _numbered(events: Sequence[OpEvent], module: str, trace: Trace) -> tuple[StepWindow, ...]:
    """Return the host's steps on one device: by when each execution was launched, else by their order."""
    executions = executions_of(events)
    launched = [e for e in executions if e.run in trace.launched_ns]
    if not launched:
        try:
            windows = step_windows(events, module, trace.steps)
        except ValueError:
            return ()
        if not _late(events, trace):
            return windows
        first_ns = next(execution.start_ns for execution in executions if execution.module == module)
        return (replace(windows[0], start_ns=first_ns), *windows[1:])
    ends: dict[int, float] = {}
    own = _of_steps(launched, module, trace)
    for execution, place in own:
        ends[place] = max(ends.get(place, execution.end_ns), execution.end_ns)
    if not own:
        return ()
    first_ns = min(execution.start_ns for execution, _ in own)
    before_ns = first_ns if _late(events, trace) else _before(events, first_ns)
    return _adjoining(ends, trace.steps, first_ns, before_ns)


def _of_steps(
    launched: Sequence[DeviceExecution], module: str, trace: Trace
) -> list[tuple[DeviceExecution, int]]:
    """Return executions with the place of their step in `Trace.steps`."""
    starts = [span.start_ns for span in trace.steps]
    found: list[tuple[DeviceExecution, int]] = []
    for execution in launched:
        at_ns = trace.launched_ns[execution.run]
        place = bisect_right(starts, at_ns) - 1
        # A step's program may be launched by another thread, a little after the loop went on.
        if place >= 0 and (at_ns <= trace.steps[place].end_ns or execution.module == module):
            found.append((execution, place))
    ours = [(execution, place) for execution, place in found if execution.module == module]
    if len(ours) != len(starts) or len({place for _, place in ours}) == len(starts):
        return found
    # One execution a step, and a step without any: a thread launched them when the loop was further on.
    ours.sort(key=lambda pair: trace.launched_ns[pair[0].run])
    times = [trace.launched_ns[execution.run] for execution, _ in ours]
    if any(at_ns < start for at_ns, start in zip(times, starts, strict=True)):
        return found
    return [
        (execution, max(bisect_right(times, trace.launched_ns[execution.run]) - 1, 0))
        for execution, _ in found
    ]


def _late(events: Sequence[OpEvent], trace: Trace) -> float:
    """Return how long after its launch, in ns, a device's first operation began though it had nothing to do.

    0 up to `_LATEST_NS`. The device's clock is then ahead of the host's, or the trace lacks what came before.
    """
    first = next((event for event in events if event.run in trace.launched_ns), None)
    if first is not None and first.run is not None:
        launch_ns = trace.launched_ns[first.run]
    else:
        # At the latest within the first step; a simulated device has the host's clock.
        first = next((event for event in events if event.role == "run" and not event.copy), None)
        if first is None or first.device.startswith("cpu"):
            return 0.0
        launch_ns = trace.steps[0].end_ns
    idle_ns = max(launch_ns, _before(events, first.start_ns))
    return first.start_ns - idle_ns if first.start_ns - idle_ns > _LATEST_NS else 0.0


def _said_late(late: Mapping[str, float]) -> tuple[str, ...]:
    said = ", ".join(f"{device} {ns / 1e6:.0f} ms" for device, ns in late.items() if ns)
    return (
        (
            f"the first operation began long after its launch ({said}): clocks of host and device differ, "
            "or the trace lacks what ran before; the first step begins with it",
        )
        if said
        else ()
    )


def _uncut(events: Sequence[OpEvent], module: str, windows: tuple[StepWindow, ...]) -> tuple[StepWindow, ...]:
    """Return numbered steps without a last one whose execution the trace cuts."""
    executions = [e for e in executions_of(events) if e.module == module]
    if len(windows) < 2 or not executions or _whole(executions)[-1] is executions[-1]:
        return windows
    return windows[:-1] if executions[-1].end_ns > windows[-2].end_ns else windows


def _cut_steps(
    found: Mapping[str, Sequence[StepWindow]], kept: Mapping[str, Sequence[StepWindow]]
) -> tuple[str, ...]:
    said = ", ".join(
        f"{device} {each[-1].step}" for device, each in found.items() if len(kept[device]) < len(each)
    )
    return (f"steps that the trace cuts are left out: {said}",) if said else ()


def _of_others(
    own: Mapping[str, Sequence[OpEvent]], module: str, windows: Mapping[str, Sequence[StepWindow]]
) -> tuple[str, ...]:
    """Say which numbered steps hold no execution of the program that most time went to."""
    found: set[int] = set()
    for device, each in windows.items():
        ends = sorted(e.end_ns for e in executions_of(own[device]) if e.module == module)
        for window in each:
            place = bisect_right(ends, window.start_ns)
            if ends and (place == len(ends) or ends[place] > window.end_ns):
                found.add(window.step)
    numbers = ", ".join(map(str, sorted(found)))
    return (f"steps without {module}, which count in the means: {numbers}",) if found else ()


def _before(events: Sequence[OpEvent], first_ns: float) -> float:
    """Return until when the device was at work that was launched before its first step."""
    ends = (e.end_ns for e in events if e.start_ns < first_ns and e.role == "run" and not e.copy)
    return min(max(ends, default=float("-inf")), first_ns)


def _adjoining(
    ends: Mapping[int, float], steps: Sequence[HostSpan], first_ns: float, before_ns: float
) -> tuple[StepWindow, ...]:
    windows = []
    begin = None
    for place in sorted(ends):
        span = steps[place]
        if begin is None:
            begin = min(max(span.start_ns, before_ns), first_ns)
        elif place - 1 not in ends:  # what a step that is missing took is not the next one's
            begin = max(begin, min(span.start_ns, ends[place]))
        number = span.step if span.step is not None else place
        end = max(begin, ends[place])
        windows.append(StepWindow(step=number, start_ns=begin, end_ns=end))
        begin = end
    return tuple(windows)


def _of_device(spans: Sequence[HostSpan]) -> tuple[StepWindow, ...]:
    numbers = [span.step if span.step is not None else place for place, span in enumerate(spans)]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(len(spans)))
    return with_gaps([(s.start_ns, s.end_ns, number) for s, number in zip(spans, numbers, strict=True)])


def _whole(executions: Sequence[DeviceExecution]) -> list[DeviceExecution]:
    """Return executions without a first or last one that the trace cuts: all others have more operations."""
    counts = [execution.operations for execution in executions]
    inner = set(counts[1:-1])
    if len(inner) != 1:
        return list(executions)
    (usual,) = inner
    return list(executions[counts[0] < usual : len(counts) - (counts[-1] < usual)])


def _cut(
    found: Mapping[str, Sequence[DeviceExecution]], whole: Mapping[str, Sequence[DeviceExecution]]
) -> tuple[str, ...]:
    less = {device: len(each) - len(whole[device]) for device, each in found.items()}
    said = ", ".join(f"{device} {number}" for device, number in less.items() if number)
    return (f"executions that the trace cuts are no steps: {said}",) if said else ()


def _cannot_number(
    trace: Trace, module: str, executions: Mapping[str, Sequence[DeviceExecution]]
) -> tuple[str, ...]:
    if not trace.steps:
        return ()
    counts = sorted({sum(e.module == module for e in own) for own in executions.values()})
    found = " or ".join(map(str, counts)) or "0"
    return (
        f"the host numbered {len(trace.steps)} steps, and which of them {found} executions of {module} are "
        "of is not known",
    )


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
