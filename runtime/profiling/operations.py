"""What an operation of a trace is: by the program's text where there is one, and else by its name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ...sharding.errors import UserError
from ...sharding.hlo.frames import user_line
from ...sharding.hlo.text import COLLECTIVES, Collective, Instruction
from .account import CollectiveKey, Ledger
from .events import OpEvent, transfer_of
from .held import Programs
from .profile import Operation

_CONTAINERS = ("while", "conditional", "call", "async-start")
# The mesh axes of a collective that no saved program tells of.
_UNKNOWN = "unknown"
# A collective's kernel where nothing else says what it is for: by NCCL's and RCCL's names
# (`ncclDevKernel_AllReduce_Sum_…`, `ncclSymkDevKernel_AllGather_…` by symmetric memory), and by XLA's own.
_NCCL = re.compile(
    r"(?:n|r|ms)ccl(?:Sym[a-z]*)?(?:Dev)?(?:Generic)?Kernel_?([A-Za-z]*)|\b(AllReduce|RaggedAllToAll)Kernel"
)
_NCCL_KINDS = {
    "AllReduce": "all_reduce",
    "AllGather": "all_gather",
    "ReduceScatter": "reduce_scatter",
    "AllToAll": "all_to_all",
    "RaggedAllToAll": "ragged_all_to_all",
    "SendRecv": "send_recv",
    "Broadcast": "collective_broadcast",
    "Reduce": "reduce",
}
# XLA's names of what only sets bytes moving or waits for them: `copy-done.2`, `slice-done`, `recv-done.1`.
_MOVED = re.compile(
    r"^(?:copy|slice|dynamic-slice|dynamic-update-slice)-(?:start|done)[.\d]*$"
    r"|^(?:send|recv)(?:-start|-done)?[.\d]*$|^async-done[.\d]*$"
)
# TPUs' names of fusions that are collectives and do not begin with their opcodes: the start of one that runs
# beside other fusions, the wait for it, and a reduction of which each device keeps its part.
_FUSED = {
    "async-collective-start": "collective",
    "async-collective-done": "collective",
    "all-reduce-scatter": "reduce_scatter",
}
# What a collective between TPU slices runs along.
_SLICES = "between slices"
_NO_SYMBOL = re.compile(r"\W")


class OpReader:
    """Reads operations by their programs; those of others than the step's, `module`, bear its name."""

    def __init__(self, programs: Programs, module: str) -> None:
        self._programs = programs
        self._module = module
        self._known: dict[tuple[str, str, str, str], CollectiveKey | None] = {}
        self._events: dict[str, OpEvent] = {}
        self._symbols: dict[int, dict[str, Instruction]] = {}

    def name(self, event: OpEvent) -> str:
        """Return the name under which an operation is counted: with its program's, if that is another one."""
        own = event.module in (self._module, "") or event.copy
        name = event.op if own else f"{event.module}/{event.op}"
        self._events.setdefault(name, event)
        return name

    def instruction(self, event: OpEvent) -> Instruction | None:
        """Return the instruction of its program that an operation carries out."""
        saved = self._programs.of(event)
        if saved is None:
            return None
        instructions = saved.program.instructions
        if (found := instructions.get(event.op)) is not None:
            return found
        if id(saved) not in self._symbols:
            # A kernel bears its fusion's name, as far as a symbol can.
            self._symbols[id(saved)] = {_NO_SYMBOL.sub("_", name): i for name, i in instructions.items()}
        return self._symbols[id(saved)].get(event.kernel.removesuffix(".kd"))

    def collective_of(self, event: OpEvent) -> CollectiveKey | None:
        """Return kind and mesh axes of a communication; None for anything else."""
        if event.copy:
            return None
        # Another program's instruction may bear the same name and be something else.
        key = (event.module, event.program, event.op, event.kernel)
        if key not in self._known:
            self._known[key] = self._read_key(event)
        return self._known[key]

    def is_copy(self, event: OpEvent) -> bool:
        """Tell whether an operation only moves bytes between memories, or waits until they are moved."""
        return event.copy or (_MOVED.match(event.op) is not None and self.collective_of(event) is None)

    def is_container(self, event: OpEvent) -> bool:
        """Tell loops, calls and conditionals."""
        instruction = self.instruction(event)
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
        saved = self._programs.of(event)
        source = (
            user_line(saved.program, instruction) if saved is not None and instruction is not None else None
        )
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
        instruction, saved = self.instruction(event), self._programs.of(event)
        if kind := event.transfer or transfer_of(instruction.attributes if instruction is not None else ""):
            return kind, _SLICES
        if instruction is None or saved is None:
            others = self._programs.saved is not None and event.module not in (self._module, "")
            return _key_by_name(event, "other program" if others else _UNKNOWN)
        if instruction.collective is None:
            # A library's own communication, behind a call that XLA knows nothing of.
            return _key_by_kernel(event, _UNKNOWN)
        if not saved.mesh:
            return instruction.collective.kind, _group_label(instruction.collective)
        try:
            return instruction.collective.kind, saved.axes(instruction).label
        except ValueError as error:
            raise UserError(f"the saved mesh does not fit the saved program: {error}") from error


def _group_label(collective: Collective) -> str:
    """Return how many devices communicate with each other, where no mesh says along which axes."""
    sizes = sorted({len(group) for group in collective.groups})
    if collective.kind == "collective_permute" or not sizes:
        return "pairs"
    return f"groups of {' or '.join(map(str, sizes))}"


def _key_by_name(event: OpEvent, axes: str = _UNKNOWN) -> CollectiveKey | None:
    if (fused := _FUSED.get(event.op.rstrip(".0123456789"))) is not None:
        return fused, axes
    # XLA's own names begin with the opcode; the longest one first, for `all-to-all` ends another.
    kinds = sorted(COLLECTIVES, key=len, reverse=True)
    kind = next((COLLECTIVES[opcode] for opcode in kinds if event.op.startswith(opcode)), None)
    return (kind, axes) if kind is not None else _key_by_kernel(event, axes)


def _key_by_kernel(event: OpEvent, axes: str) -> CollectiveKey | None:
    match = _NCCL.search(event.kernel)
    if match is None:
        return None
    called = match[1] or match[2] or ""
    named = (kind for name, kind in _NCCL_KINDS.items() if called.startswith(name))
    return next(named, "collective"), axes


def _add(total: dict[str, float] | dict[str, int], more: Mapping[str, float] | Mapping[str, int]) -> None:
    for key, value in more.items():
        total[key] += value  # pyright: ignore[reportArgumentType, reportOperatorIssue]
