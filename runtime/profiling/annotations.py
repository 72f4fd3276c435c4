"""Which of the host's numbered spans are a trace's steps, where it numbered several kinds of things.

A loop may number its epochs around its steps, and its evaluations beside them, each under a name of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .events import HostSpan, OpEvent, Trace


def with_one_kind_of_steps(trace: Trace, module: str) -> Trace:
    """Return a trace whose numbered spans are of one name: that under which most of `module` was launched.

    The innermost span counts. Where no launch is known, the most spans among which the executions of `module`
    on a device divide.
    """
    kinds: dict[str, list[HostSpan]] = defaultdict(list)
    for span in trace.steps:
        kinds[span.name].append(span)
    if len(kinds) < 2:
        return _counted(trace)
    name = _by_launches(trace, module) if trace.launched_ns else _by_number(trace, module, kinds)
    others = ", ".join(sorted(kind or "without a name" for kind in kinds if kind != name))
    note = f"the steps are those numbered as {name or 'nothing'}; the host numbered others as {others}"
    return _counted(replace(trace, steps=tuple(kinds[name]), notes=(*trace.notes, note)))


def _counted(trace: Trace) -> Trace:
    """Return a trace whose steps have numbers of their own, and one span each.

    Several threads may number one step at once, one for each device; and a loop may count anew. Of spans
    inside of others of their name the outer ones are the steps, as of a step and its microbatches.
    """
    steps: list[HostSpan] = []
    inner = 0
    for span in trace.steps:
        last = steps[-1] if steps else None
        if (
            last is not None
            and span.step is not None
            and span.step == last.step
            and span.start_ns < last.end_ns
        ):
            steps[-1] = replace(last, end_ns=max(last.end_ns, span.end_ns))
        elif last is not None and last.start_ns < span.start_ns and span.end_ns < last.end_ns:
            inner += 1
        else:
            steps.append(span)
    if inner:
        note = f"{inner} spans that the host numbered inside of others of their name are parts of these steps"
        trace = replace(trace, notes=(*trace.notes, note))
    numbers = [span.step for span in steps if span.step is not None]
    if len(set(numbers)) == len(numbers):
        return replace(trace, steps=tuple(steps))
    note = (
        f"the host's numbers of steps, {min(numbers)} to {max(numbers)}, come again: steps are counted from 0"
    )
    counted = tuple(replace(span, step=place) for place, span in enumerate(steps))
    return replace(trace, steps=counted, notes=(*trace.notes, note))


def _by_launches(trace: Trace, module: str) -> str:
    starts = [span.start_ns for span in trace.steps]
    runs = {event.run for event in trace.events if event.module == module and event.run is not None}
    held: Counter[str] = Counter({span.name: 0 for span in trace.steps})
    for run in runs & set(trace.launched_ns):
        at_ns = trace.launched_ns[run]
        for span in reversed(trace.steps[: bisect_right(starts, at_ns)]):
            if at_ns <= span.end_ns:
                held[span.name] += 1
                break
    return held.most_common(1)[0][0]


def _by_number(trace: Trace, module: str, kinds: Mapping[str, Sequence[HostSpan]]) -> str:
    counts = {len(_runs(trace.events, device, module)) for device in trace.devices} - {0}
    fits = {name: spans for name, spans in kinds.items() if all(n % len(spans) == 0 for n in counts)}
    lasts = {name: sum(span.end_ns - span.start_ns for span in spans) for name, spans in kinds.items()}
    return max(fits or kinds, key=lambda name: (len(kinds[name]), lasts[name]))


def _runs(events: Sequence[OpEvent], device: str, module: str) -> set[int]:
    return {e.run for e in events if e.device == device and e.module == module and e.run is not None}
