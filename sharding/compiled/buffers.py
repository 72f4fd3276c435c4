"""Which buffers the values of a program lie in: who shares memory with whom.

Every array that an instruction makes is a buffer, but for what XLA's buffer assignment puts into another's:

- views: ``bitcast``, tuples and their elements, the done of an asynchronous operation
- what a loop carries: one buffer for what goes in, for the body's parameter, its root and the result
- outputs that the module's ``input_output_alias`` puts into an argument
- updates in place: the operand of a ``dynamic-update-slice``, and what an instruction's ``aliasing_operands``
  or ``output_to_operand_aliasing`` lets it write into, if that is not read again
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..hlo.loops import Loop, branches, callees
from ..hlo.shapes import HBM_SPACES, HOST_SPACE, Array, leaves, parse_shape
from ..hlo.text import Instruction, Program
from .aliasing import Sharing, entry_aliases
from .roofline import target

_INDEX = re.compile(r"\bindex=(\d+)")
_BARRIERS = frozenset({"optimization-barrier", "opt-barrier", "add-dependency", "domain"})
_VIEWS = _BARRIERS | {"bitcast", "copy-done"}


@dataclass(kw_only=True)
class Block:
    """One buffer; when it comes and when it is last used are places of the replay."""

    name: str
    array: Array
    born: int
    last: int
    pinned: bool = False

    @property
    def bytes(self) -> float:
        return self.array.padded_bytes


@dataclass(kw_only=True)
class Replay:
    """The schedule as a row of places, loops entered once, and every buffer with its life."""

    blocks: list[Block] = field(default_factory=list)
    places: list[str] = field(default_factory=list)


# One block for each array of a value, in the order of `shapes.leaves`.
_Blocks = list[Block]


def replay(program: Program, loops: dict[str, Loop], platform: str) -> Replay:
    """Return the buffers of a scheduled program."""
    walk = _Walk(program, loops, platform)
    walk.entry()
    return walk.replay


def in_hbm(array: Array, platform: str) -> bool:
    """Whether an array lies in the device's main memory."""
    return array.space in HBM_SPACES.get(platform, HBM_SPACES["gpu"])


def on_host(array: Array) -> bool:
    """Whether an array lies in the host's memory."""
    return array.space == HOST_SPACE


class _Walk:
    def __init__(self, program: Program, loops: dict[str, Loop], platform: str) -> None:
        self._program = program
        self._loops = loops
        self._sharing = Sharing(program, platform)
        self.replay = Replay()
        self._uses: dict[str, int] = {}
        for computation in program.computations.values():
            for name in computation.instructions:
                for operand in program.instructions[name].operands:
                    self._uses[operand] = self._uses.get(operand, 0) + 1

    def entry(self) -> None:
        computation = self._program.computations[self._program.entry]
        arguments: dict[int, _Blocks] = {}
        for name in computation.instructions:
            instruction = self._program.instructions[name]
            if instruction.opcode == "parameter":
                blocks = self._fresh(instruction, pinned=True)
                for block in blocks:
                    block.born = 0
                arguments[int(instruction.literal or 0)] = blocks
        root = self._program.instructions[computation.root]
        outputs: list[Block | None] = [None] * len(leaves(parse_shape(root.shape)))
        for output, parameter in entry_aliases(self._program.header):
            if output < len(outputs) and parameter in arguments and arguments[parameter]:
                outputs[output] = arguments[parameter][0]
        values = self._run(self._program.entry, arguments, outputs)
        for block in values.get(computation.root, []):
            block.pinned = True
        end = len(self.replay.places)
        for block in self.replay.blocks:
            if block.pinned:
                block.last = end

    def _fresh(self, instruction: Instruction, *, pinned: bool = False) -> _Blocks:
        return [
            self._block(instruction.name, array, pinned) for array in leaves(parse_shape(instruction.shape))
        ]

    def _block(self, name: str, array: Array, pinned: bool = False) -> Block:
        here = max(len(self.replay.places) - 1, 0)
        block = Block(name=name, array=array, born=here, last=here, pinned=pinned)
        self.replay.blocks.append(block)
        return block

    def _run(
        self, name: str, arguments: dict[int, _Blocks], outputs: list[Block | None]
    ) -> dict[str, _Blocks]:
        """Go through a computation; `outputs` are the buffers its root's arrays are put into, where given."""
        computation = self._program.computations[name]
        destined = self._destined(computation.root, outputs)
        left = {n: self._uses.get(n, 0) for n in computation.instructions}
        values: dict[str, _Blocks] = {}
        for member in computation.instructions:
            instruction = self._program.instructions[member]
            self.replay.places.append(member)
            here = len(self.replay.places) - 1
            for operand in instruction.operands:
                left[operand] = left.get(operand, 0) - 1
                if instruction.opcode not in ("tuple", "get-tuple-element", "bitcast"):
                    for block in values.get(operand, ()):
                        block.last = max(block.last, here)
            values[member] = self._value(instruction, values, arguments, destined.get(member, {}), left)
            for block in values[member]:
                block.last = max(block.last, here)
        here = len(self.replay.places) - 1
        for block in values.get(computation.root, ()):
            block.last = max(block.last, here)
        return values

    def _destined(self, root: str, outputs: list[Block | None]) -> dict[str, dict[int, Block]]:
        """Trace the root's arrays back through views to what makes them: instruction → array → buffer."""
        found: dict[str, dict[int, Block]] = {}
        for index, block in enumerate(outputs):
            if block is None:
                continue
            maker = self._maker(root, index)
            if maker is not None:
                found.setdefault(maker[0], {})[maker[1]] = block
        return found

    def _maker(self, name: str, index: int) -> tuple[str, int] | None:
        while True:
            instruction = self._program.instructions.get(name)
            if instruction is None or instruction.opcode == "parameter":
                return None
            if instruction.opcode == "tuple":
                for operand in instruction.operands:
                    count = len(leaves(parse_shape(self._program.instructions[operand].shape)))
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
        whole = parse_shape(self._program.instructions[element.operands[0]].shape)
        place = _INDEX.search(element.attributes)
        if isinstance(whole, Array) or place is None:
            return 0
        return sum(len(leaves(part)) for part in whole[: int(place[1])])

    def _value(
        self,
        instruction: Instruction,
        values: dict[str, _Blocks],
        arguments: dict[int, _Blocks],
        destined: dict[int, Block],
        left: dict[str, int],
    ) -> _Blocks:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return arguments.get(int(instruction.literal or 0)) or self._fresh(instruction)
        if opcode == "tuple":
            return [block for operand in operands for block in values.get(operand, [])]
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
                if inner in self._program.computations:
                    self._run(inner, {0: carried}, list(carried) if inner == loop.body else [])
            for block in carried:
                block.last = max(block.last, len(self.replay.places) - 1)
            return carried
        if opcode in ("call", "conditional"):
            return self._called(instruction, values, destined)
        if opcode.endswith("-start") and opcode != "all-reduce-start":
            return self._started(instruction, values, destined)
        return self._made(instruction, values, destined, left)

    def _called(
        self, instruction: Instruction, values: dict[str, _Blocks], destined: dict[int, Block]
    ) -> _Blocks:
        made = self._shared(instruction, destined)
        if instruction.opcode == "call":
            inner = callees(instruction).get("to_apply") or callees(instruction).get("calls", "")
            if inner in self._program.computations:
                given = {place: values.get(name, []) for place, name in enumerate(instruction.operands)}
                self._run(inner, given, list(made))
            return made
        for place, branch in enumerate(branches(instruction)):
            if branch in self._program.computations and place + 1 < len(instruction.operands):
                self._run(branch, {0: values.get(instruction.operands[place + 1], [])}, list(made))
        return made

    def _shared(self, instruction: Instruction, destined: dict[int, Block]) -> _Blocks:
        arrays = leaves(parse_shape(instruction.shape))
        return [
            destined.get(place) or self._block(instruction.name, array) for place, array in enumerate(arrays)
        ]

    def _started(
        self, instruction: Instruction, values: dict[str, _Blocks], destined: dict[int, Block]
    ) -> _Blocks:
        """The start of an asynchronous operation holds its operands, its results and some flags."""
        shape = parse_shape(instruction.shape)
        given = [block for operand in instruction.operands for block in values.get(operand, [])]
        if isinstance(shape, Array):
            return self._shared(instruction, destined)
        if instruction.opcode == "copy-start":
            made = destined.get(0) or self._block(instruction.name, leaves(shape[0])[0])
            return [
                made,
                *given[:1],
                *(self._block(instruction.name, a) for part in shape[2:] for a in leaves(part)),
            ]
        held = len(leaves(shape[0]))
        if instruction.opcode == "dynamic-update-slice-start" or self._sharing.updated(instruction) == 0:
            return [*given[:held], *given[:1], *(self._block(instruction.name, a) for a in leaves(shape[2:]))]
        results = [
            destined.get(held + place) or self._block(instruction.name, array)
            for place, array in enumerate(leaves(shape[1:]))
        ]
        operands = given[:held]
        operands += [self._block(instruction.name, a) for a in leaves(shape[0])[len(operands) :]]
        return [*operands, *results]

    def _done(self, instruction: Instruction, started: _Blocks) -> _Blocks:
        arrays = leaves(parse_shape(instruction.shape))
        if instruction.opcode.endswith("-update") or len(started) == len(arrays):
            return started
        if instruction.opcode in ("recv-done", "send-done"):
            return [*started[: len(arrays) - 1], *started[-1:]]
        start = self._program.instructions.get(instruction.operands[0])
        shape = parse_shape(start.shape) if start is not None else ()
        held = 0 if isinstance(shape, Array) or not shape else len(leaves(shape[0]))
        return started[held : held + len(arrays)]

    def _made(
        self,
        instruction: Instruction,
        values: dict[str, _Blocks],
        destined: dict[int, Block],
        left: dict[str, int],
    ) -> _Blocks:
        arrays = leaves(parse_shape(instruction.shape))
        if instruction.opcode == "send":
            given = [block for operand in instruction.operands for block in values.get(operand, [])]
            return [*given[:1], *(self._block(instruction.name, a) for a in arrays[1:])]
        if target(instruction) == "ConcatBitcast":
            return self._shared(instruction, destined)
        given_flat = [
            (operand, block) for operand in instruction.operands for block in values.get(operand, [])
        ]
        found: _Blocks = []
        sharing = self._sharing.of(instruction, len(given_flat))
        taken: set[int] = set()
        for place, array in enumerate(arrays):
            if place in destined:
                found.append(destined[place])
                continue
            block = None
            for operand, must in sharing.get(place, []):
                if operand >= len(given_flat) or operand in taken:
                    continue
                name, candidate = given_flat[operand]
                free = must or (left.get(name, 0) <= 0 and not candidate.pinned)
                if free and candidate.array.space == array.space and candidate.bytes == array.padded_bytes:
                    block = candidate
                    taken.add(operand)
                    break
            found.append(block or self._block(instruction.name, array))
        return found
