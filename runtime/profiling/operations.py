"""What an operation of a trace is: by the program's text where there is one, and else by its name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ...sharding.errors import UserError
from ...sharding.hlo.text import COLLECTIVES, Instruction
from .account import CollectiveKey, Ledger
from .events import OpEvent
from .profile import Operation
from .program import SavedProgram

_CONTAINERS = ("while", "conditional", "call", "async-start")
# The mesh axes of a collective that no saved program tells of.
_UNKNOWN = "unknown"
# A collective's kernel by NCCL's and RCCL's names, where nothing else says what it is for.
_NCCL = re.compile(r"nccl(?:Dev)?Kernel_?([A-Za-z]+)")
_NCCL_KINDS = {
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "AllToAll": "all_to_all",
    "SendRecv": "send_recv",
    "Broadcast": "collective_broadcast",
    "Reduce": "reduce",
}
# XLA's names of what only sets bytes moving or waits for them: `copy-done.2`, `slice-done`, `recv-done.1`.
_MOVED = re.compile(
    r"^(?:copy|slice|dynamic-slice|dynamic-update-slice|send|recv)-(?:start|done)[.\d]*$|^async-done[.\d]*$"
)
_NO_SYMBOL = re.compile(r"\W")


class OpReader:
    """Reads operations of one step's program, `module`, and tells those of other programs apart from them."""

    def __init__(self, program: SavedProgram | None, module: str) -> None:
        self._program = program
        self._module = module
        self._known: dict[str, CollectiveKey | None] = {}
        self._events: dict[str, OpEvent] = {}
        self._symbols: dict[str, Instruction] = {}
        if program is not None:
            # A kernel bears its fusion's name, as far as a symbol can.
            self._symbols = {_NO_SYMBOL.sub("_", name): i for name, i in program.program.instructions.items()}

    def name(self, event: OpEvent) -> str:
        """Return the name under which an operation is counted: with its program's, if that is another one."""
        own = event.module in (self._module, "") or event.copy
        name = event.op if own else f"{event.module}/{event.op}"
        self._events.setdefault(name, event)
        return name

    def instruction(self, event: OpEvent) -> Instruction | None:
        """Return the saved program's instruction that an operation carries out."""
        if self._program is None or event.module not in (self._module, ""):
            return None
        found = self._program.program.instructions.get(event.op)
        return found if found is not None else self._symbols.get(event.kernel.removesuffix(".kd"))

    def collective_of(self, event: OpEvent) -> CollectiveKey | None:
        """Return kind and mesh axes of a communication; None for anything else."""
        if event.copy:
            return None
        # Another program's instruction may bear the same name and be something else.
        if event.module not in (self._module, ""):
            return _key_by_name(event, "other program" if self._program is not None else _UNKNOWN)
        if event.op not in self._known:
            self._known[event.op] = self._read_key(event)
        return self._known[event.op]

    def is_copy(self, event: OpEvent) -> bool:
        """Tell whether an operation only moves bytes between memories, or waits until they are moved."""
        return event.copy or (_MOVED.match(event.op) is not None and self.collective_of(event) is None)

    def is_container(self, event: OpEvent) -> bool:
        """Tell loops, calls and conditionals."""
        instruction = self.instruction(event) if event.module == self._module else None
        return (instruction.opcode if instruction is not None else event.op).startswith(_CONTAINERS)

    def operations(self, ledgers: Sequence[Ledger], wall_seconds: float) -> tuple[Operation, ...]:
        """Return every operation with its mean over `ledgers`, the longest first.

        Args:
            ledgers: One for each step on each device, whose names are those of `name`.
            wall_seconds: The time of all of them, of which shares are said.
        """
        total_ns: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        for ledger in ledgers:
            _add(total_ns, ledger.op_ns)
            _add(counts, ledger.op_counts)
        return tuple(
            self._operation(name, spent_ns / 1e9, counts[name], len(ledgers), wall_seconds)
            for name, spent_ns in sorted(total_ns.items(), key=lambda item: -item[1])
        )

    def _operation(self, name: str, spent: float, count: int, ledgers: int, wall_seconds: float) -> Operation:
        event = self._events[name]
        instruction, key = self.instruction(event), self.collective_of(event)
        source = instruction.source if instruction is not None else None
        kind = "copy" if self.is_copy(event) else "compute"
        return Operation(
            name=name,
            kind=f"{key[0]}({key[1]})" if key is not None else kind,
            opcode=instruction.opcode if instruction is not None else "",
            source=f"{source.file}:{source.line}" if source is not None else None,
            op_name=instruction.op_name if instruction is not None else "",
            count=count / ledgers,
            seconds=spent / ledgers,
            share=spent / wall_seconds if wall_seconds else 0.0,
        )

    def _read_key(self, event: OpEvent) -> CollectiveKey | None:
        instruction = self.instruction(event)
        if instruction is None or self._program is None:
            return _key_by_name(event)
        if instruction.collective is None:
            return None
        try:
            return instruction.collective.kind, self._program.axes(instruction).label
        except ValueError as error:
            raise UserError(f"the saved mesh does not fit the saved program: {error}") from error


def _key_by_name(event: OpEvent, axes: str = _UNKNOWN) -> CollectiveKey | None:
    # XLA's own names begin with the opcode; the longest one first, for `all-to-all` ends another.
    kinds = sorted(COLLECTIVES, key=len, reverse=True)
    kind = next((COLLECTIVES[opcode] for opcode in kinds if event.op.startswith(opcode)), None)
    if kind is None and (match := _NCCL.search(event.kernel)) is not None:
        named = (kind for name, kind in _NCCL_KINDS.items() if match[1].startswith(name))
        kind = next(named, "collective")
    return (kind, axes) if kind is not None else None


def _add(total: dict[str, float] | dict[str, int], more: Mapping[str, float] | Mapping[str, int]) -> None:
    for key, value in more.items():
        total[key] += value  # pyright: ignore[reportArgumentType, reportOperatorIssue]
