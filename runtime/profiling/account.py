"""Account for every nanosecond of a step on one device, once.

At each moment the device is in exactly one state, the first of these that holds:

    compute        an operation that is not communication runs (communication beside it is *overlapped*)
    collective     only communication runs (*exposed*: the step would be shorter without it)
    compute        only a loop, call or conditional runs: it is between two of its operations
    copy           only transfers between memories run, or the device waits for one
    data wait      nothing runs and the host waits for data
    idle           nothing runs

so their times add up to the step's. Operations running at once share the moment equally.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .events import HostSpan, OpEvent
from .steps import StepWindow

#: What a collective is, as (kind, mesh axes), such as ("all_gather", "fsdp").
CollectiveKey = tuple[str, str]

_COMPUTE, _COLLECTIVE, _CONTAINER, _COPY, _WAIT = range(5)


@dataclass(kw_only=True)
class Ledger:
    """One step's times on one device, in nanoseconds, and how often things ran."""

    compute_ns: float = 0.0
    copy_ns: float = 0.0
    data_wait_ns: float = 0.0
    idle_ns: float = 0.0
    exposed_ns: dict[CollectiveKey, float] = field(default_factory=lambda: defaultdict(float))
    overlapped_ns: dict[CollectiveKey, float] = field(default_factory=lambda: defaultdict(float))
    collective_counts: dict[CollectiveKey, int] = field(default_factory=lambda: defaultdict(int))
    op_ns: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    op_counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    start_ns: float
    end_ns: float
    state: int
    op: str
    collective: CollectiveKey | None


def account(
    events: Sequence[OpEvent],
    window: StepWindow,
    waits: Iterable[HostSpan],
    collective_of: Callable[[OpEvent], CollectiveKey | None],
    is_container: Callable[[OpEvent], bool],
    is_copy: Callable[[OpEvent], bool] = lambda event: event.copy,
    name_of: Callable[[OpEvent], str] = lambda event: event.op,
) -> Ledger:
    """Account for `window` on the one device that `events` are of.

    Args:
        events: The device's operations in order of start; those outside of the window do not count.
        window: The step.
        waits: When the host waited for data.
        collective_of: Kind and mesh axes of a communication, None for anything else.
        is_container: Whether an operation is a loop, call or conditional; one that holds other operations of
            its own line is one in any case.
        is_copy: Whether an operation only moves bytes between memories, or waits until they are moved.
        name_of: The name under which an operation is counted.
    """
    ledger = Ledger()
    inside = [
        e
        for e in events
        # One of no length that begins with the window is in it.
        if e.start_ns < window.end_ns and (e.end_ns > window.start_ns or e.start_ns == window.start_ns)
    ]
    holding = _holding(inside)
    spans = []
    for place, event in enumerate(inside):
        collective = collective_of(event)
        if event.role == "flight" and collective is None:
            continue  # a copy between memories beside the core's work is neither
        if collective is not None:
            state = _COLLECTIVE
        elif is_copy(event):
            state = _COPY
        else:
            state = _CONTAINER if place in holding or is_container(event) else _COMPUTE
        start, end = max(event.start_ns, window.start_ns), min(event.end_ns, window.end_ns)
        name = name_of(event)
        spans.append(_Span(start_ns=start, end_ns=end, state=state, op=name, collective=collective))
        if event.role == "run" and window.start_ns <= event.start_ns:
            ledger.op_counts[name] += 1
            # The done of an asynchronous collective is the same once more, as what a send brings is.
            if collective is not None and "-done" not in event.op and not event.op.startswith("recv"):
                ledger.collective_counts[collective] += 1
    for wait in waits:
        start, end = max(wait.start_ns, window.start_ns), min(wait.end_ns, window.end_ns)
        if start < end:
            spans.append(_Span(start_ns=start, end_ns=end, state=_WAIT, op="", collective=None))
    _sweep(spans, window, ledger)
    return ledger


def _holding(events: Sequence[OpEvent]) -> set[int]:
    """Return the places of events that hold a later event of their line."""
    lines: dict[str, list[int]] = defaultdict(list)
    for place, event in enumerate(events):
        if event.role == "run":
            lines[event.line].append(place)
    holding: set[int] = set()
    for places in lines.values():
        places.sort(key=lambda place: (events[place].start_ns, -events[place].end_ns))
        open_places: list[int] = []
        for place in places:
            event = events[place]
            while open_places and events[open_places[-1]].end_ns <= event.start_ns:
                open_places.pop()
            if open_places and event.end_ns <= events[open_places[-1]].end_ns:
                holding.add(open_places[-1])
            open_places.append(place)
    return holding


def _sweep(spans: Sequence[_Span], window: StepWindow, ledger: Ledger) -> None:
    moments = [(span.start_ns, 1, place) for place, span in enumerate(spans)]
    moments += [(span.end_ns, 0, place) for place, span in enumerate(spans)]
    moments.sort()
    active: tuple[dict[int, _Span], ...] = ({}, {}, {}, {}, {})
    now = window.start_ns
    for moment, begins, place in moments:
        if moment > now:
            _credit(active, moment - now, ledger)
            now = moment
        span = spans[place]
        if begins:
            if span.end_ns > span.start_ns:
                active[span.state][place] = span
        else:
            active[span.state].pop(place, None)
    ledger.idle_ns += max(window.end_ns - now, 0.0)


def _credit(active: tuple[dict[int, _Span], ...], duration_ns: float, ledger: Ledger) -> None:
    if active[_COMPUTE]:
        ledger.compute_ns += duration_ns
        for span in active[_COMPUTE].values():
            ledger.op_ns[span.op] += duration_ns / len(active[_COMPUTE])
        # Overlapped time is counted once a kind: a start's flight and its done may both be open.
        for key in {span.collective for span in active[_COLLECTIVE].values() if span.collective}:
            ledger.overlapped_ns[key] += duration_ns
    elif active[_COLLECTIVE]:
        for span in active[_COLLECTIVE].values():
            share = duration_ns / len(active[_COLLECTIVE])
            ledger.op_ns[span.op] += share
            if span.collective is not None:
                ledger.exposed_ns[span.collective] += share
    elif active[_CONTAINER]:
        ledger.compute_ns += duration_ns
        innermost = max(active[_CONTAINER].values(), key=lambda span: span.start_ns)
        ledger.op_ns[innermost.op] += duration_ns
    elif active[_COPY]:
        ledger.copy_ns += duration_ns
        for span in active[_COPY].values():
            ledger.op_ns[span.op] += duration_ns / len(active[_COPY])
    elif active[_WAIT]:
        ledger.data_wait_ns += duration_ns
    else:
        ledger.idle_ns += duration_ns
