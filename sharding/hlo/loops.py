"""How often each computation of a program runs in one step: loops counted, sums over all call sites.

Where the compiler writes a loop's ``known_trip_count`` it is taken. Otherwise the loop is run on the numbers
that steer it: the constants among the scalars it begins with, what its body makes of them, what its condition
says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .text import Instruction, Program

#: A loop that has not ended after so many turns is taken as one whose count nobody can read off: the longest
#: loops of training steps (a scan over tokens) have some ten thousand turns.
MOST_TURNS = 1 << 17

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLEE = re.compile(r"\b(condition|body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_DIRECTION = re.compile(r"\bdirection=(\w+)")
_INDEX = re.compile(r"\bindex=(\d+)")

_BINARY: Mapping[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "divide": lambda a, b: int(a / b) if b else 0,
    "remainder": lambda a, b: a - b * int(a / b) if b else 0,
}
_COMPARED: Mapping[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_SAME = frozenset(
    {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"}
)

#: An unknown number, a known one, or the elements of a tuple.
_Value = int | None | tuple["_Value", ...]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A while instruction, and its turns: None where they could not be read off."""

    name: str
    body: str
    condition: str
    turns: int | None


def callees(instruction: Instruction) -> dict[str, str]:
    """Return role → computation of what an instruction runs: ``body``, ``condition``, ``calls``, …"""
    return dict(_CALLEE.findall(instruction.attributes))


def branches(instruction: Instruction) -> tuple[str, ...]:
    """Return the computations of which a conditional runs one."""
    listed = _BRANCHES.search(instruction.attributes)
    if listed is not None:
        return tuple(name.strip().lstrip("%") for name in listed[1].split(",") if name.strip())
    found = callees(instruction)
    return tuple(found[role] for role in ("true_computation", "false_computation") if role in found)


def loops(program: Program) -> dict[str, Loop]:
    """Return every while of the program by the name of its instruction."""
    found = {}
    for name, instruction in program.instructions.items():
        if instruction.opcode == "while":
            inside = callees(instruction)
            found[name] = Loop(
                name=name,
                body=inside.get("body", ""),
                condition=inside.get("condition", ""),
                turns=_turns(program, instruction, inside),
            )
    return found


def _turns(program: Program, loop: Instruction, inside: Mapping[str, str]) -> int | None:
    known = _KNOWN.search(loop.attributes)
    if known is not None:
        return int(known[1])
    body, condition = inside.get("body"), inside.get("condition")
    if body is None or condition is None or not {body, condition} <= set(program.computations):
        return None
    if not loop.operands:
        return None
    state = _Numbers(program, None).of(loop.operands[0])
    for turns in range(MOST_TURNS):
        going = _Numbers(program, state).of(program.computations[condition].root)
        if not isinstance(going, int):
            return None
        if not going:
            return turns
        after = _Steered(program, body, state).next()
        if after == state:
            return None  # what steers the loop is not a number of its own
        state = after
    return None


class _Numbers:
    """The numbers that instructions hold, one computation's parameter being `state`; others are unknown."""

    def __init__(self, program: Program, state: _Value) -> None:
        self._program = program
        self._state = state
        self._known: dict[str, _Value] = {}

    def of(self, name: str) -> _Value:
        if name not in self._known:
            self._known[name] = None  # what refers to itself is unknown
            self._known[name] = self._read(self._program.instructions.get(name))
        return self._known[name]

    def _read(self, instruction: Instruction | None) -> _Value:
        if instruction is None:
            return None
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            return _literal(instruction.literal)
        if opcode == "parameter":
            return self._state
        if opcode == "tuple":
            return tuple(self._scalar(operand) for operand in operands)
        if opcode == "get-tuple-element":
            whole, index = self.of(operands[0]), _INDEX.search(instruction.attributes)
            if isinstance(whole, tuple) and index is not None and int(index[1]) < len(whole):
                return whole[int(index[1])]
            return None
        if opcode in _SAME:
            return self.of(operands[0]) if operands else None
        if opcode in ("fusion", "call"):
            return self._called(instruction)
        return self._computed(instruction, [self.of(operand) for operand in operands])

    def _scalar(self, name: str) -> _Value:
        """Only what steers loops is followed: whole numbers, not arrays."""
        instruction = self._program.instructions.get(name)
        if instruction is None or not instruction.shape.startswith(("(", "s", "u", "pred")):
            return None
        if "[]" not in instruction.shape and not instruction.shape.startswith("("):
            return None
        return self.of(name)

    def _called(self, instruction: Instruction) -> _Value:
        inner = callees(instruction).get("calls") or callees(instruction).get("to_apply")
        computation = self._program.computations.get(inner or "")
        if computation is None or "[]" not in instruction.shape:
            return None
        numbers = _Numbers(self._program, None)
        for name in computation.instructions:
            parameter = self._program.instructions[name]
            if parameter.opcode == "parameter":
                place = int(parameter.literal or 0)
                if place < len(instruction.operands):
                    numbers._known[name] = self._scalar(instruction.operands[place])
        return numbers.of(computation.root)

    @staticmethod
    def _computed(instruction: Instruction, values: list[_Value]) -> _Value:
        opcode = instruction.opcode
        numbers = [value for value in values if isinstance(value, int)]
        if len(numbers) != len(values) or not numbers:
            return None
        if opcode == "compare" and (direction := _DIRECTION.search(instruction.attributes)) is not None:
            return int(_COMPARED[direction[1]](numbers[0], numbers[1]))
        if opcode == "select":
            return numbers[1] if numbers[0] else numbers[2]
        if opcode == "not" and instruction.shape.startswith("pred"):
            return int(not numbers[0])
        if opcode == "negate":
            return -numbers[0]
        if opcode in _BINARY and len(numbers) == 2:
            return _BINARY[opcode](numbers[0], numbers[1])
        return None


class _Steered:
    """One turn of a loop's body on the numbers that steer it."""

    def __init__(self, program: Program, body: str, state: _Value) -> None:
        self._numbers = _Numbers(program, state)
        self._root = program.computations[body].root

    def next(self) -> _Value:
        return self._numbers.of(self._root)


def _literal(text: str) -> int | None:
    text = text.strip()
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return int(text)
    except ValueError:
        return None


def weights(
    program: Program, found: Mapping[str, Loop], worst: Callable[[Instruction], str | None]
) -> dict[str, float]:
    """Return how often each computation that is scheduled runs in a step.

    The inside of a fusion or of an asynchronous wrapper is no schedule: it counts as one instruction.

    `worst` names the branch that a conditional is taken to run. A loop whose turns are unknown counts once.
    """
    runs: dict[str, float] = {}
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in program.computations:
            return
        seen.add(name)
        for callee, _ in _scheduled(program, name, found, worst):
            visit(callee)
        order.append(name)

    visit(program.entry)
    runs[program.entry] = 1.0
    for name in reversed(order):  # callers before what they call
        for callee, times in _scheduled(program, name, found, worst):
            runs[callee] = runs.get(callee, 0.0) + runs.get(name, 0.0) * times
    return runs


def _scheduled(
    program: Program,
    name: str,
    found: Mapping[str, Loop],
    worst: Callable[[Instruction], str | None],
) -> list[tuple[str, float]]:
    called: list[tuple[str, float]] = []
    for member in program.computations[name].instructions:
        instruction = program.instructions[member]
        opcode = instruction.opcode
        if opcode == "while":
            loop = found[member]
            turns = 1 if loop.turns is None else loop.turns
            called += [(loop.body, turns), (loop.condition, turns + 1)]
        elif opcode == "call":
            called += [(callee, 1.0) for callee in callees(instruction).values()]
        elif opcode == "conditional" and (branch := worst(instruction)) is not None:
            called.append((branch, 1.0))
    return [(callee, times) for callee, times in called if callee in program.computations]
