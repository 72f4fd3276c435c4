"""Where a sequence of operations begins again: executions of a program that nothing else numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from .events import OpEvent, Trace


def with_executions(trace: Trace) -> Trace:
    """Return a trace whose devices without a known execution have theirs told by repetition, and say so."""
    devices: dict[str, list[OpEvent]] = defaultdict(list)
    for event in trace.events:
        devices[event.device].append(event)
    most = {module: max(counts) for module, counts in trace.launched.items()}
    told = []
    events: list[OpEvent] = []
    for device, own in devices.items():
        found = numbered(own, len(trace.steps), most)
        told += [device] if found is not own else []
        events += found
    if not told:
        return trace
    note = (
        f"the trace holds no launches of the kernels on {', '.join(told)}: executions are told by where the "
        "sequence of operations begins again"
    )
    events.sort(key=lambda event: event.start_ns)
    return replace(trace, events=tuple(events), notes=(*trace.notes, note))


def numbered(
    events: Sequence[OpEvent], steps: int, most: Mapping[str, int] | None = None
) -> Sequence[OpEvent]:
    """Return one device's operations with executions (`OpEvent.run`) told by repetition, program by program.

    `events` themselves where an execution is known, and where nothing repeats.
    """
    if any(event.run is not None for event in events):
        return events
    runs: dict[int, int] = {}
    first = 0
    modules = dict.fromkeys(event.module for event in events if not event.copy)
    # What names no program is one only where nothing names any.
    for module in modules if len(modules) == 1 else (module for module in modules if module):
        places = [k for k, event in enumerate(events) if event.module == module and not event.copy]
        begins = blocks([events[k] for k in places], steps, (most or {}).get(module))
        for k in places:
            block = bisect_right(begins, events[k].start_ns) - 1
            if block >= 0:
                runs[k] = first + block
        first += len(begins)
    if not runs:
        return events
    return [replace(event, run=runs[k]) if k in runs else event for k, event in enumerate(events)]


def blocks(events: Sequence[OpEvent], steps: int, most: int | None = None) -> list[float]:
    """Return when each execution begins, none where the operations do not repeat.

    Args:
        events: The operations of one program on one device, in order of start.
        steps: Steps that the host numbered, or 0: what runs once in each says where it begins.
        most: Executions that the host launched, where that is known: a loop within one may repeat too.
    """
    if not events:
        return []
    if most == 1:
        return [events[0].start_ns]
    return _once_a_step(events, steps) or _by_period(events, most)


def period(sequence: Sequence[object]) -> int:
    """Return the smallest p with ``sequence[i] == sequence[i + p]`` for all i; its length if none repeats."""
    # The longest beginning that is also an ending, as in string matching: p is what is left of it.
    borders = [0] * len(sequence)
    border = 0
    for place in range(1, len(sequence)):
        while border and sequence[place] != sequence[border]:
            border = borders[border - 1]
        border += sequence[place] == sequence[border]
        borders[place] = border
    return len(sequence) - (borders[-1] if borders else 0)


def _once_a_step(events: Sequence[OpEvent], steps: int) -> list[float]:
    starts: dict[str, list[float]] = defaultdict(list)
    for event in events:
        starts[event.op].append(event.start_ns)
    once = [times for times in starts.values() if len(times) == steps]
    if not once:
        return []
    begins = [min(times[k] for times in once) for k in range(steps)]
    begins[0] = min(begins[0], events[0].start_ns)
    return begins


def _by_period(events: Sequence[OpEvent], most: int | None) -> list[float]:
    lines: dict[str, list[OpEvent]] = defaultdict(list)
    for event in events:
        lines[event.line].append(event)
    # Streams run beside one another: the order is sure on each one alone.
    main = max(lines.values(), key=len)
    length = period([event.op for event in main])
    while most and most * length < len(main) and length < len(main):
        length += length
    if 2 * length > len(main):
        return []
    # A trace that begins amid an execution shows where executions begin by the gaps between them.
    spans = [(event.start_ns, event.end_ns) for event in main]
    phase = 0 if len(main) % length == 0 else max(range(length), key=lambda at: gap_before(spans, at, length))
    begins = [main[place].start_ns for place in range(phase, len(main), length)]
    return [min(begins[0], events[0].start_ns), *begins[1:]] if phase == 0 else begins


def gap_before(spans: Sequence[tuple[float, float]], phase: int, length: int) -> float:
    """Return the mean time before the (start, end) at `phase` and every `length` after it."""
    places = [place for place in range(phase, len(spans), length) if place]
    return fmean(spans[place][0] - spans[place - 1][1] for place in places) if places else 0.0
