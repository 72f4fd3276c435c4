"""Which step each operation belongs to.

Devices run behind the host, so the time of an operation does not say its step. The order does: the k-th
execution of the step's program is the k-th step of the window, which begins and ends with idle devices.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .events import HostSpan, OpEvent


@dataclass(frozen=True, kw_only=True)
class StepWindow:
    """One step on one device: from the end of the step before to the end of its own last operation."""

    step: int
    start_ns: float
    end_ns: float


def busiest_module(events: Sequence[OpEvent]) -> str:
    """Return the program that most of the devices' time went to; empty where the trace names none."""
    seconds: Counter[str] = Counter()
    for event in events:
        if event.role == "run" and event.module:
            seconds[event.module] += event.end_ns - event.start_ns  # pyright: ignore[reportArgumentType]
    return seconds.most_common(1)[0][0] if seconds else ""


def step_windows(events: Sequence[OpEvent], module: str, steps: Sequence[HostSpan]) -> tuple[StepWindow, ...]:
    """Divide one device's time into steps.

    The windows adjoin, so that whatever happens between two steps (an evaluation, a wait) belongs to the
    later one. The first begins where the host began the step, for the device waited from then on.

    Args:
        events: One device's operations, in order of start.
        module: The step's program.
        steps: The host's numbered steps in order; empty where nobody numbered them.

    Raises:
        ValueError: The executions found cannot be shared out among `steps`.
    """
    ours = [event for event in events if event.module == module and event.role != "flight"]
    spans = _executions(ours, len(steps))
    if not spans:
        return ()
    each, left = divmod(len(spans), len(steps)) if steps else (1, 0)
    if left or not each:
        raise ValueError(f"{len(spans)} executions of {module!r} do not divide among {len(steps)} steps")
    numbers = [span.step if span.step is not None else k for k, span in enumerate(steps)] or range(len(spans))
    begin = min(steps[0].start_ns, spans[0][0]) if steps else spans[0][0]
    windows = []
    for number, last in zip(numbers, range(each - 1, len(spans), each), strict=True):
        end = max(begin, spans[last][1])
        windows.append(StepWindow(step=number, start_ns=begin, end_ns=end))
        begin = end
    return tuple(windows)


def _executions(events: Sequence[OpEvent], num_steps: int) -> list[tuple[float, float]]:
    """Return start and end of each execution, in order."""
    if any(event.run is not None for event in events):
        runs: dict[int, list[OpEvent]] = defaultdict(list)
        for event in events:
            if event.run is not None:
                runs[event.run].append(event)
        return sorted((min(e.start_ns for e in run), max(e.end_ns for e in run)) for run in runs.values())
    return _executions_by_repetition(events, num_steps)


def _executions_by_repetition(events: Sequence[OpEvent], num_steps: int) -> list[tuple[float, float]]:
    """Divide unnumbered events (GPU kernels) where the operations that run once a step come round again."""
    starts: dict[str, list[float]] = defaultdict(list)
    for event in events:
        starts[event.op].append(event.start_ns)
    once = [times for times in starts.values() if len(times) == num_steps]
    if not once:
        return [(events[0].start_ns, max(e.end_ns for e in events))] if events and num_steps <= 1 else []
    begins = [min(times[k] for times in once) for k in range(num_steps)]
    begins[0] = min(begins[0], events[0].start_ns)
    ends = []
    for k, begin in enumerate(begins):
        following = begins[k + 1] if k + 1 < num_steps else float("inf")
        ends.append(max(e.end_ns for e in events if begin <= e.start_ns < following))
    return list(zip(begins, ends, strict=True))
