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
        return trace
    name = _by_launches(trace, module) if trace.launched_ns else _by_number(trace, module, kinds)
    others = ", ".join(sorted(kind or "without a name" for kind in kinds if kind != name))
    note = f"the steps are those numbered as {name or 'nothing'}; the host numbered others as {others}"
    return replace(trace, steps=tuple(kinds[name]), notes=(*trace.notes, note))


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
