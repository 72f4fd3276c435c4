"""Steps of several executions each, which nobody numbered: programs in an order that comes again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from .repetition import gap_before
from .steps import DeviceExecution, FoundSteps, grouped, uneven

# How far apart the busy times of groups may lie that are one step done again and again.
_ALIKE = 2.0
# Of a device's busy time, what the groups take at least: before and after them other programs may run.
_MOST = 0.9


def in_groups(executions: Mapping[str, Sequence[DeviceExecution]], said: Sequence[str]) -> FoundSteps:
    """Return groups of executions that follow each other in one order as steps, if they take alike long.

    Args:
        executions: What ran on each device, in order of start.
        said: Notes to go before what is said here.
    """
    groups: dict[str, list[list[DeviceExecution]]] = {}
    for device, own in executions.items():
        # Executions are alike by their program alone, or, where that is several under one name, by size too.
        found = [_groups(own, [e.module for e in own]), _groups(own, [(e.module, e.operations) for e in own])]
        groups[device] = next((each for each in found if each and _alike(each)), found[0])
        if not groups[device]:
            why = f"the executions of {_programs(own)} repeat in no order" if own else "no execution is known"
            return FoundSteps(windows={}, notes=(*said, f"no steps: {why}"))
        if not _alike(groups[device]):
            busy = [_busy_ns(group) for group in groups[device]]
            why = (
                f"{len(groups[device][0])} executions follow each other {len(busy)} times in one order, but "
                f"take {min(busy) / 1e6:.3f} to {max(busy) / 1e6:.3f} ms"
            )
            return FoundSteps(windows={}, notes=(*said, f"no steps: {why}"))
    if not groups:
        return FoundSteps(windows={}, notes=(*said, "no steps: no execution is known"))
    return FoundSteps(
        windows=grouped(groups), notes=(*said, *_how(groups), *_outside(executions, groups), *uneven(groups))
    )


def _groups(executions: Sequence[DeviceExecution], names: Sequence[object]) -> list[list[DeviceExecution]]:
    """Return the groups of the shortest order in which nearly all of a device's time repeats, none else."""
    places: dict[object, int] = {}
    sequence = np.array([places.setdefault(name, len(places)) for name in names])
    busy = np.concatenate([[0.0], np.cumsum([execution.busy_ns for execution in executions])])
    for length in range(1, len(sequence) // 2 + 1):
        start, end = _stretch(sequence, length, busy)
        if end - start >= 2 * length and busy[end] - busy[start] >= _MOST * busy[-1]:
            start += _phase(executions[start:end], length)
            return [list(executions[k : k + length]) for k in range(start, end - length + 1, length)]
    return []


def _alike(groups: Sequence[Sequence[DeviceExecution]]) -> bool:
    busy = [_busy_ns(group) for group in groups]
    return len(groups) > 1 and max(busy) <= _ALIKE * min(busy)


def _busy_ns(group: Sequence[DeviceExecution]) -> float:
    return sum(execution.busy_ns for execution in group)


def _stretch(sequence: np.ndarray, length: int, busy: np.ndarray) -> tuple[int, int]:
    """Return the stretch, of those in which all that is `length` apart is the same, that takes most time."""
    same = np.concatenate([[False], sequence[length:] == sequence[:-length], [False]])
    begins = np.flatnonzero(same[1:] & ~same[:-1])
    ends = np.flatnonzero(~same[1:] & same[:-1]) + length
    if not len(begins):
        return 0, 0
    longest = int(np.argmax(busy[ends] - busy[begins]))
    return int(begins[longest]), int(ends[longest])


def _phase(executions: Sequence[DeviceExecution], length: int) -> int:
    """Return where the first whole group begins: where the gaps are widest, if the stretch is cut."""
    if len(executions) % length == 0:
        return 0
    spans = [(execution.start_ns, execution.end_ns) for execution in executions]
    return max(range(length), key=lambda at: gap_before(spans, at, length))


def _how(groups: Mapping[str, Sequence[Sequence[DeviceExecution]]]) -> tuple[str, ...]:
    first = [own[0] for own in groups.values()]
    lengths = sorted({len(group) for group in first})
    what = f"{' or '.join(map(str, lengths))} executions in their order are one"
    what = "each execution is one" if lengths == [1] else what
    programs = Counter(execution.module for execution in first[0])
    if len(programs) > 1:
        what += f" ({', '.join(f'{number} of {module}' for module, number in programs.items())})"
    return (f"nobody numbered the steps: {what}",)


def _outside(
    executions: Mapping[str, Sequence[DeviceExecution]],
    groups: Mapping[str, Sequence[Sequence[DeviceExecution]]],
) -> tuple[str, ...]:
    left = sum(len(own) - sum(map(len, groups[device])) for device, own in executions.items())
    return (f"executions outside of these steps: {left}",) if left else ()


def _programs(executions: Sequence[DeviceExecution]) -> str:
    number = len({execution.module for execution in executions})
    return f"{number} programs" if number > 1 else executions[0].module or "a program"
