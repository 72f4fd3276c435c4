"""From traces and the program they ran to a `Profile`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ...sharding.errors import UserError
from ...sharding.hlo.text import COLLECTIVES, Instruction
from .account import CollectiveKey, Ledger, account
from .events import OpEvent, Trace
from .executions import StepWindow, busiest_module, step_windows
from .profile import CollectiveTime, HostStep, Operation, Profile, StepTime
from .program import SavedProgram

_CONTAINERS = ("while", "conditional", "call", "async-start")
_CPU_NOTE = (
    "simulated devices share this machine's cores: much of a collective's time is waiting for other devices"
)
# The mesh axes of a collective that no saved program tells of.
_UNKNOWN = "unknown"
_NO_PROGRAM_NOTE = "no program was saved beside the trace, so mesh axes and source lines are unknown"


def analyse(traces: Mapping[int, Trace], program: SavedProgram | None, files: Sequence[str] = ()) -> Profile:
    """Account for every step on every device.

    Args:
        traces: What each process recorded, by process number.
        program: The step's program and mesh; without it collectives are told by name and have no axes.
        files: The traces' files, for the record.

    Raises:
        UserError: The traces hold no operation, or the step's program did not run once a step.
    """
    events = [event for trace in traces.values() for event in trace.events]
    if not events:
        raise UserError(
            "the trace holds no operation of any device: no step ran while it was captured, or on a CPU the "
            "host tracer was off"
        )
    module = busiest_module(events)
    notes = [_CPU_NOTE] if events[0].device.startswith("cpu") else []
    if program is None:
        notes.append(_NO_PROGRAM_NOTE)
    elif any(event.module == program.program.name for event in events):
        module = program.program.name
    else:
        raise UserError(
            f"the saved program is {program.program.name!r}, but the trace holds {module!r}: "
            "capture the profile again"
        )
    reader = _OpReader(program, module)
    times: list[StepTime] = []
    ledgers: list[Ledger] = []
    for process, trace in traces.items():
        for device, own in _by_device(trace).items():
            # Only a CPU's devices are numbered across processes.
            name = device if device.startswith("cpu") or len(traces) == 1 else f"process {process} {device}"
            try:
                windows = step_windows(own, module, trace.steps)
            except ValueError as error:
                raise UserError(f"cannot tell the steps of {device} apart: {error}") from error
            for window in windows:
                ledger = account(own, window, trace.waits, reader.collective_of, reader.is_container)
                ledgers.append(ledger)
                times.append(_step_time(window, name, ledger))
    if not times:
        raise UserError(f"cannot tell the steps of {module!r} apart: none of its operations runs once a step")
    return Profile(
        platform=events[0].device.partition(":")[0],
        module=module,
        mesh=dict(program.mesh) if program is not None else {},
        files=tuple(files),
        steps=tuple(sorted(times, key=lambda time: (time.step, _device_order(time.device)))),
        host_steps=tuple(step for process, trace in traces.items() for step in _host_steps(process, trace)),
        operations=_operations(ledgers, reader, sum(time.wall_seconds for time in times)),
        notes=tuple(notes),
    )


class _OpReader:
    """What an operation is, by the program's text where there is one, and else by its name."""

    def __init__(self, program: SavedProgram | None, module: str) -> None:
        self._program = program
        self._module = module
        self._known: dict[str, CollectiveKey | None] = {}

    def instruction(self, op: str) -> Instruction | None:
        return self._program.program.instructions.get(op) if self._program is not None else None

    def key(self, op: str) -> CollectiveKey | None:
        if op not in self._known:
            self._known[op] = self._read_key(op)
        return self._known[op]

    def collective_of(self, event: OpEvent) -> CollectiveKey | None:
        # Another program's instruction may bear the same name and be something else.
        if event.module in (self._module, ""):
            return self.key(event.op)
        return _key_by_name(event.op, "other program" if self._program is not None else _UNKNOWN)

    def is_container(self, event: OpEvent) -> bool:
        instruction = self.instruction(event.op) if event.module == self._module else None
        return (instruction.opcode if instruction is not None else event.op).startswith(_CONTAINERS)

    def _read_key(self, op: str) -> CollectiveKey | None:
        instruction = self.instruction(op)
        if instruction is None or self._program is None:
            return _key_by_name(op)
        if instruction.collective is None:
            return None
        try:
            return instruction.collective.kind, self._program.axes(instruction).label
        except ValueError as error:
            raise UserError(f"the saved mesh does not fit the saved program: {error}") from error


def _key_by_name(op: str, axes: str = _UNKNOWN) -> CollectiveKey | None:
    # XLA's own names begin with the opcode; the longest one first, for `all-to-all` ends another.
    kinds = sorted(COLLECTIVES, key=len, reverse=True)
    kind = next((COLLECTIVES[opcode] for opcode in kinds if op.startswith(opcode)), None)
    return (kind, axes) if kind is not None else None


def _by_device(trace: Trace) -> dict[str, list[OpEvent]]:
    devices: dict[str, list[OpEvent]] = defaultdict(list)
    for event in trace.events:
        devices[event.device].append(event)
    return devices


def _device_order(device: str) -> tuple[str, int]:
    platform, _, number = device.rpartition(":")
    return platform, int(number)


def _step_time(window: StepWindow, device: str, ledger: Ledger) -> StepTime:
    keys = dict.fromkeys([*ledger.collective_counts, *ledger.exposed_ns, *ledger.overlapped_ns])
    collectives = [
        CollectiveTime(
            kind=key[0],
            axes=key[1],
            count=ledger.collective_counts.get(key, 0),
            exposed_seconds=ledger.exposed_ns.get(key, 0.0) / 1e9,
            overlapped_seconds=ledger.overlapped_ns.get(key, 0.0) / 1e9,
        )
        for key in keys
    ]
    return StepTime(
        step=window.step,
        device=device,
        wall_seconds=(window.end_ns - window.start_ns) / 1e9,
        compute_seconds=ledger.compute_ns / 1e9,
        collectives=tuple(collectives),
        data_wait_seconds=ledger.data_wait_ns / 1e9,
        idle_seconds=ledger.idle_ns / 1e9,
    )


def _host_steps(process: int, trace: Trace) -> list[HostStep]:
    steps = []
    for span in trace.steps:
        waits = [min(w.end_ns, span.end_ns) - max(w.start_ns, span.start_ns) for w in trace.waits]
        steps.append(
            HostStep(
                process=process,
                step=span.step if span.step is not None else len(steps),
                wall_seconds=(span.end_ns - span.start_ns) / 1e9,
                data_wait_seconds=sum(wait for wait in waits if wait > 0) / 1e9,
            )
        )
    return steps


def _operations(ledgers: Sequence[Ledger], reader: _OpReader, wall_seconds: float) -> tuple[Operation, ...]:
    total_ns: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for ledger in ledgers:
        _add(total_ns, ledger.op_ns)
        _add(counts, ledger.op_counts)
    operations = []
    for op, spent_ns in sorted(total_ns.items(), key=lambda item: -item[1]):
        instruction, key = reader.instruction(op), reader.key(op)
        source = instruction.source if instruction is not None else None
        operations.append(
            Operation(
                name=op,
                kind=f"{key[0]}({key[1]})" if key is not None else "compute",
                opcode=instruction.opcode if instruction is not None else "",
                source=f"{source.file}:{source.line}" if source is not None else None,
                op_name=instruction.op_name if instruction is not None else "",
                count=counts[op] / len(ledgers),
                seconds=spent_ns / len(ledgers) / 1e9,
                share=spent_ns / 1e9 / wall_seconds if wall_seconds else 0.0,
            )
        )
    return tuple(operations)


def _add(total: dict[str, float] | dict[str, int], more: Mapping[str, float] | Mapping[str, int]) -> None:
    for key, value in more.items():
        total[key] += value  # pyright: ignore[reportArgumentType, reportOperatorIssue]
