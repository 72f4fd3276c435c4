"""A trace as plain records, the same for every kind of device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# What a send or a receive between TPU slices, through the hosts, carries out, by libtpu's attribute.
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


def transfer_of(text: str) -> str:
    """Return which collective between slices an instruction's text is a part of, empty for any other.

    >>> transfer_of('recv-done(%r), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}')
    'all_reduce'
    """
    found = _TRANSFER.search(text)
    if found is None:
        return ""
    return "collective_permute" if found[1] == "ONE_TO_ONE" else found[1].lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class OpEvent:
    """One operation's run on one device.

    Attributes:
        device: Kind and number, ``cpu:3``.
        line: The thread, stream or core that ran it. Events of one line nest; those of two lines may overlap.
        op: The HLO instruction's name, or a kernel's where the trace knows no better.
        module: The program's name, empty where the trace does not say.
        program: What tells programs of one name apart, empty where the trace does not say.
        run: Which execution of the program this belongs to; None where the trace does not say.
        start_ns, end_ns: Nanoseconds on the trace's clock.
        role: ``run`` occupies its line; ``rest`` is what an operation still ran elsewhere after its own line
            went on; ``flight`` is the span of an asynchronous transfer, which occupies no core.
        kernel: A GPU kernel's own name; empty on other devices.
        copy: Whether it moves bytes between memories and computes nothing.
        transfer: The collective between TPU slices that it is a part of, such as ``all_reduce``.
    """

    device: str
    line: str
    op: str
    module: str
    run: int | None
    start_ns: float
    end_ns: float
    role: Literal["run", "rest", "flight"] = "run"
    program: str = ""
    kernel: str = ""
    copy: bool = False
    transfer: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSpan:
    """A span of the host's time: a step with its number and what it is a step of, or a wait for data."""

    start_ns: float
    end_ns: float
    step: int | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one process recorded: operations by device, the loop's steps, its waits for data.

    Attributes:
        events: Operations in order of start.
        steps: Steps that the host numbered, in order.
        waits: Waits for data, in order.
        device_steps: Steps that a device's own ``Steps`` line holds, by device.
        launched_ns: Host time at which an execution was launched, by `OpEvent.run`, where the trace says.
        launched: Executions of each program that the host launched, device by device, where the trace says.
        devices: Every device that the trace has a plane for, with operations or without.
        programs: Serialised modules that the trace holds, by name and number, ``jit_step(17)``.
        notes: Sentences on what the trace lacks.
    """

    events: tuple[OpEvent, ...]
    steps: tuple[HostSpan, ...]
    waits: tuple[HostSpan, ...]
    device_steps: Mapping[str, tuple[HostSpan, ...]] = field(default_factory=dict)
    launched_ns: Mapping[int, float] = field(default_factory=dict)
    launched: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    programs: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
