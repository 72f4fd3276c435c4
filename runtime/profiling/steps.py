"""Steps of a device and executions of programs on it, as records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .events import OpEvent


@dataclass(frozen=True, kw_only=True)
class StepWindow:
    """One step on one device.

    A numbered step goes from the end of the step before to the end of its own last operation. One that nobody
    numbered goes from its own first to its own last operation, and `gap_ns` is what passed before it; where
    the step before has not ended by then, it begins with that one's end, so that no time is counted twice.
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
class DeviceExecution:
    """One execution of a program on one device: from its first to its last operation.

    `operations` are those that have a line of their own: what others still run elsewhere varies by chance.
    """

    module: str
    run: int
    start_ns: float
    end_ns: float
    busy_ns: float
    operations: int


def executions_of(events: Sequence[OpEvent]) -> list[DeviceExecution]:
    """Return the executions of all programs on one device, in order of start."""
    runs: dict[tuple[str, int], list[OpEvent]] = defaultdict(list)
    for event in events:
        if event.run is not None and event.role != "flight":
            runs[event.module, event.run].append(event)
    found = [
        DeviceExecution(
            module=module,
            run=run,
            start_ns=min(e.start_ns for e in own),
            end_ns=max(e.end_ns for e in own),
            busy_ns=busy_ns(own),
            operations=sum(event.role == "run" for event in own),
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


def with_gaps(spans: Sequence[tuple[float, float, int]]) -> tuple[StepWindow, ...]:
    """Return (start, end, number) in order as steps that nobody numbered on this device's time."""
    windows = []
    before = None
    for start, end, number in spans:
        begin = start if before is None else min(max(start, before), end)
        gap = 0.0 if before is None else max(start - before, 0.0)
        windows.append(StepWindow(step=number, start_ns=begin, end_ns=end, gap_ns=gap))
        before = end if before is None else max(before, end)
    return tuple(windows)


def grouped(groups: Mapping[str, Sequence[Sequence[DeviceExecution]]]) -> dict[str, tuple[StepWindow, ...]]:
    """Return steps that are groups of executions, by device."""
    return {
        device: with_gaps(
            [
                (group[0].start_ns, max(execution.end_ns for execution in group), number)
                for number, group in enumerate(own)
            ]
        )
        for device, own in groups.items()
    }


def uneven(counted: Mapping[str, Sequence[object]]) -> tuple[str, ...]:
    """Say which devices have fewer steps than others."""
    numbers = {device: len(own) for device, own in counted.items()}
    if len(set(numbers.values())) == 1:
        return ()
    most = max(numbers.values())
    fewer = ", ".join(f"{device} {number}" for device, number in numbers.items() if number < most)
    return (f"not every device has all {most} steps: {fewer}",)
