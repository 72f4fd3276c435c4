"""Buffers of a module's values and the time for which each is alive: XLA's buffer assignment, replayed.

Each array that an instruction makes gets an allocation, except those that XLA puts into another's:

- views: ``bitcast``, tuples and their elements, the done of an asynchronous operation
- values that a loop carries: the operand, the body's parameter, its root and the result share one
- outputs that the module's ``input_output_alias`` puts into an argument
- updates in place: the operand of a ``dynamic-update-slice``, and an operand that an instruction's
  ``aliasing_operands`` or ``output_to_operand_aliasing`` lets it write into, if nothing reads it later
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..hlo.loops import WhileLoop, branches, callees
from ..hlo.shapes import HBM_SPACES, HOST_SPACE, Array, leaves, parse_shape
from ..hlo.text import HloModule, Instruction
from .aliasing import Aliasing, entry_aliases
from .attention import unstated_scratch
from .roofline import target

_INDEX = re.compile(r"\bindex=(\d+)")
_BARRIERS = frozenset({"optimization-barrier", "opt-barrier", "add-dependency", "domain"})
_VIEWS = _BARRIERS | {"bitcast", "copy-done"}


@dataclass(kw_only=True)
class Allocation:
    """One buffer, alive from its `first` to its `last` place in the replay; a `pinned` one to the end.

    An `assumed` one is no array of the program: a library works in it that was not there to say so.
    """

    name: str
    array: Array
    first: int
    last: int
    pinned: bool = False
    assumed: bool = False

    @property
    def bytes(self) -> float:
        """Bytes with padding."""
        return self.array.padded_bytes


@dataclass(kw_only=True)
class Replay:
    """All allocations of a step, and the instructions in the order gone through, a loop's body once."""

    allocations: list[Allocation] = field(default_factory=list)
    places: list[str] = field(default_factory=list)


# The allocations of a value's arrays, in the order of `shapes.leaves`.
_Allocations = list[Allocation]


def replay(module: HloModule, loops: dict[str, WhileLoop], platform: str) -> Replay:
    """Return the allocations of a scheduled module; `platform` is ``tpu``, ``gpu`` or ``cpu``."""
    walk = _Replayer(module, loops, platform)
    walk.entry()
    return walk.replay


def in_hbm(array: Array, platform: str) -> bool:
    """Whether an array lies in the device's main memory."""
    return array.space in HBM_SPACES.get(platform, HBM_SPACES["gpu"])


def on_host(array: Array) -> bool:
    """Whether an array lies in the host's memory."""
    return array.space == HOST_SPACE


class _Replayer:
    """A walk over a module's schedule that gives each value its allocations; `entry` fills `replay`."""

    def __init__(self, module: HloModule, loops: dict[str, WhileLoop], platform: str) -> None:
        self._module = module
        self._loops = loops
        self._aliasing = Aliasing(module, platform)
        self.replay = Replay()
        self._uses: dict[str, int] = {}
        for computation in module.computations.values():
            for name in computation.instructions:
                for operand in module.instructions[name].operands:
                    self._uses[operand] = self._uses.get(operand, 0) + 1

    def entry(self) -> None:
        computation = self._module.computations[self._module.entry]
        arguments: dict[int, _Allocations] = {}
        for name in computation.instructions:
            instruction = self._module.instructions[name]
            if instruction.opcode == "parameter":
                allocations = self._fresh(instruction, pinned=True)
                for allocation in allocations:
                    allocation.first = 0
                arguments[int(instruction.literal or 0)] = allocations
        root = self._module.instructions[computation.root]
        outputs: list[Allocation | None] = [None] * len(leaves(parse_shape(root.shape)))
        for output, parameter in entry_aliases(self._module.header):
            if output < len(outputs) and parameter in arguments and arguments[parameter]:
                outputs[output] = arguments[parameter][0]
        values = self._run(self._module.entry, arguments, outputs)
        for allocation in values.get(computation.root, []):
            allocation.pinned = True
        end = len(self.replay.places)
        for allocation in self.replay.allocations:
            if allocation.pinned:
                allocation.last = end

    def _fresh(self, instruction: Instruction, *, pinned: bool = False) -> _Allocations:
        return [
            self._allocation(instruction.name, array, pinned)
            for array in leaves(parse_shape(instruction.shape))
        ]

    def _allocation(self, name: str, array: Array, pinned: bool = False) -> Allocation:
        here = max(len(self.replay.places) - 1, 0)
        allocation = Allocation(name=name, array=array, first=here, last=here, pinned=pinned)
        self.replay.allocations.append(allocation)
        return allocation

    def _run(
        self, name: str, arguments: dict[int, _Allocations], outputs: list[Allocation | None]
    ) -> dict[str, _Allocations]:
        """Go through a computation and return its values; `outputs` are where its root's arrays must be."""
        computation = self._module.computations[name]
        assigned = self._assigned(computation.root, outputs)
        left = {n: self._uses.get(n, 0) for n in computation.instructions}
        values: dict[str, _Allocations] = {}
        for member in computation.instructions:
            instruction = self._module.instructions[member]
            self.replay.places.append(member)
            here = len(self.replay.places) - 1
            for operand in instruction.operands:
                left[operand] = left.get(operand, 0) - 1
                if instruction.opcode not in ("tuple", "get-tuple-element", "bitcast"):
                    for allocation in values.get(operand, ()):
                        allocation.last = max(allocation.last, here)
            values[member] = self._value(instruction, values, arguments, assigned.get(member, {}), left)
            for allocation in values[member]:
                allocation.last = max(allocation.last, here)
        here = len(self.replay.places) - 1
        for allocation in values.get(computation.root, ()):
            allocation.last = max(allocation.last, here)
        return values

    def _assigned(self, root: str, outputs: list[Allocation | None]) -> dict[str, dict[int, Allocation]]:
        """Return instruction → array → allocation given for it: the root's, traced back through views."""
        found: dict[str, dict[int, Allocation]] = {}
        for index, allocation in enumerate(outputs):
            if allocation is None:
                continue
            maker = self._maker(root, index)
            if maker is not None:
                found.setdefault(maker[0], {})[maker[1]] = allocation
        return found

    def _maker(self, name: str, index: int) -> tuple[str, int] | None:
        """Return the instruction that makes an array of a value, and which of its arrays it is."""
        while True:
            instruction = self._module.instructions.get(name)
            if instruction is None or instruction.opcode == "parameter":
                return None
            if instruction.opcode == "tuple":
                for operand in instruction.operands:
                    count = len(leaves(parse_shape(self._module.instructions[operand].shape)))
                    if index < count:
                        name = operand
                        break
                    index -= count
                else:
                    return None
            elif instruction.opcode == "get-tuple-element":
                index += self._offset(instruction)
                name = instruction.operands[0]
            elif instruction.opcode == "copy-done":
                return instruction.operands[0], 0
            elif instruction.opcode in _VIEWS:
                name = instruction.operands[0]
            else:
                return name, index

    def _offset(self, element: Instruction) -> int:
        """Return how many arrays of a tuple come before a ``get-tuple-element``'s."""
        whole = parse_shape(self._module.instructions[element.operands[0]].shape)
        place = _INDEX.search(element.attributes)
        if isinstance(whole, Array) or place is None:
            return 0
        return sum(len(leaves(part)) for part in whole[: int(place[1])])

    def _value(
        self,
        instruction: Instruction,
        values: dict[str, _Allocations],
        arguments: dict[int, _Allocations],
        assigned: dict[int, Allocation],
        left: dict[str, int],
    ) -> _Allocations:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return arguments.get(int(instruction.literal or 0)) or self._fresh(instruction)
        if opcode == "tuple":
            return [allocation for operand in operands for allocation in values.get(operand, [])]
        if opcode == "get-tuple-element":
            begin = self._offset(instruction)
            count = len(leaves(parse_shape(instruction.shape)))
            return values.get(operands[0], [])[begin : begin + count]
        if opcode in _VIEWS and operands:
            return (
                values.get(operands[0], [])[:1]
                if opcode == "copy-done"
                else list(values.get(operands[0], []))
            )
        if opcode.endswith(("-done", "-update")) and operands:
            return self._done(instruction, values.get(operands[0], []))
        if opcode == "while":
            carried = values.get(operands[0], [])
            loop = self._loops[instruction.name]
            for inner in (loop.condition, loop.body):
                if inner in self._module.computations:
                    self._run(inner, {0: carried}, list(carried) if inner == loop.body else [])
            for allocation in carried:
                allocation.last = max(allocation.last, len(self.replay.places) - 1)
            return carried
        if opcode in ("call", "conditional"):
            return self._called(instruction, values, assigned)
        if opcode.endswith("-start") and opcode != "all-reduce-start":
            return self._started(instruction, values, assigned)
        return self._computed(instruction, values, assigned, left)

    def _called(
        self, instruction: Instruction, values: dict[str, _Allocations], assigned: dict[int, Allocation]
    ) -> _Allocations:
        made = self._results(instruction, assigned)
        if instruction.opcode == "call":
            inner = callees(instruction).get("to_apply") or callees(instruction).get("calls", "")
            if inner in self._module.computations:
                given = {place: values.get(name, []) for place, name in enumerate(instruction.operands)}
                self._run(inner, given, list(made))
            return made
        for place, branch in enumerate(branches(instruction)):
            if branch in self._module.computations and place + 1 < len(instruction.operands):
                self._run(branch, {0: values.get(instruction.operands[place + 1], [])}, list(made))
        return made

    def _results(self, instruction: Instruction, assigned: dict[int, Allocation]) -> _Allocations:
        arrays = leaves(parse_shape(instruction.shape))
        return [
            assigned.get(place) or self._allocation(instruction.name, array)
            for place, array in enumerate(arrays)
        ]

    def _started(
        self, instruction: Instruction, values: dict[str, _Allocations], assigned: dict[int, Allocation]
    ) -> _Allocations:
        """Return the allocations of the start of an asynchronous operation: operands, results and flags."""
        shape = parse_shape(instruction.shape)
        given = [allocation for operand in instruction.operands for allocation in values.get(operand, [])]
        if isinstance(shape, Array):
            return self._results(instruction, assigned)
        if instruction.opcode == "copy-start":
            made = assigned.get(0) or self._allocation(instruction.name, leaves(shape[0])[0])
            return [
                made,
                *given[:1],
                *(self._allocation(instruction.name, a) for part in shape[2:] for a in leaves(part)),
            ]
        held = len(leaves(shape[0]))
        if instruction.opcode == "dynamic-update-slice-start" or self._aliasing.updated(instruction) == 0:
            return [
                *given[:held],
                *given[:1],
                *(self._allocation(instruction.name, a) for a in leaves(shape[2:])),
            ]
        results = [
            assigned.get(held + place) or self._allocation(instruction.name, array)
            for place, array in enumerate(leaves(shape[1:]))
        ]
        operands = given[:held]
        operands += [self._allocation(instruction.name, a) for a in leaves(shape[0])[len(operands) :]]
        return [*operands, *results]

    def _done(self, instruction: Instruction, started: _Allocations) -> _Allocations:
        arrays = leaves(parse_shape(instruction.shape))
        if instruction.opcode.endswith("-update") or len(started) == len(arrays):
            return started
        if instruction.opcode in ("recv-done", "send-done"):
            return [*started[: len(arrays) - 1], *started[-1:]]
        start = self._module.instructions.get(instruction.operands[0])
        shape = parse_shape(start.shape) if start is not None else ()
        held = 0 if isinstance(shape, Array) or not shape else len(leaves(shape[0]))
        return started[held : held + len(arrays)]

    def _computed(
        self,
        instruction: Instruction,
        values: dict[str, _Allocations],
        assigned: dict[int, Allocation],
        left: dict[str, int],
    ) -> _Allocations:
        arrays = leaves(parse_shape(instruction.shape))
        if instruction.opcode == "send":
            given = [allocation for operand in instruction.operands for allocation in values.get(operand, [])]
            return [*given[:1], *(self._allocation(instruction.name, a) for a in arrays[1:])]
        if target(instruction) == "ConcatBitcast":
            return self._results(instruction, assigned)
        given_flat = [
            (operand, allocation)
            for operand in instruction.operands
            for allocation in values.get(operand, [])
        ]
        found: _Allocations = []
        shared = self._aliasing.of(instruction, len(given_flat))
        taken: set[int] = set()
        for place, array in enumerate(arrays):
            if place in assigned:
                found.append(assigned[place])
                continue
            allocation = None
            for operand, must in shared.get(place, []):
                if operand >= len(given_flat) or operand in taken:
                    continue
                name, candidate = given_flat[operand]
                free = must or (left.get(name, 0) <= 0 and not candidate.pinned)
                if free and candidate.array.space == array.space and candidate.bytes == array.padded_bytes:
                    allocation = candidate
                    taken.add(operand)
                    break
            found.append(allocation or self._allocation(instruction.name, array))
        scratch = unstated_scratch(self._module, instruction)
        if scratch:
            array = Array(dtype="u8", dims=(round(scratch),))
            self._allocation(instruction.name, array).assumed = True
        return found
