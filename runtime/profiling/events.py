"""A trace as plain records, the same for every kind of device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class OpEvent:
    """One operation's run on one device.

    Attributes:
        device: Kind and number, ``cpu:3``.
        line: The thread, stream or core that ran it. Events of one line nest; those of two lines may overlap.
        op: The HLO instruction's name, or a kernel's where the trace knows no better.
        module: The program's name, empty where the trace does not say.
        run: Which execution of the program this belongs to; None where the trace does not say.
        start_ns, end_ns: Nanoseconds on the trace's clock.
        role: ``run`` occupies its line; ``rest`` is what an operation still ran elsewhere after its own line
            went on; ``flight`` is the span of an asynchronous transfer, which occupies no core.
    """

    device: str
    line: str
    op: str
    module: str
    run: int | None
    start_ns: float
    end_ns: float
    role: Literal["run", "rest", "flight"] = "run"


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSpan:
    """A span of the host's time: a step with its number, or a wait for data."""

    start_ns: float
    end_ns: float
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one process recorded: operations by device, the loop's steps, its waits for data."""

    events: tuple[OpEvent, ...]
    steps: tuple[HostSpan, ...]
    waits: tuple[HostSpan, ...]
