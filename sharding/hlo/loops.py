"""Trip counts of a module's loops, and how often each of its computations runs in one step.

A loop's ``known_trip_count`` is taken where the compiler writes it. Otherwise the loop is interpreted on the
whole numbers that it carries and that begin as constants, until its condition is false. Of a loop whose turns
only a run knows, a program may say how many to count, by a name scope around it (`turns_scope`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .text import HloModule, Instruction

#: A loop that has not ended after so many iterations has an unknown trip count. The longest loops of training
#: steps, scans over tokens, have some ten thousand.
MOST_ITERATIONS = 1 << 17

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The scope of a loop itself, not that of a loop around it.
_NAMED = re.compile(r"\bmeshwright_turns\[(\d+)\](?!.*/body/)")
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
_UNCHANGED = frozenset(
    {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"}
)

#: An unknown number, a known one, or the elements of a tuple.
_Value = int | None | tuple["_Value", ...]


@dataclass(frozen=True, kw_only=True)
class WhileLoop:
    """A while instruction; `trip_count` is None where it could not be read.

    `told` says that only a run knows it, and the program says what to count.
    """

    name: str
    body: str
    condition: str
    trip_count: int | None
    told: bool = False


def turns_scope(count: int) -> str:
    """Return the name scope that says of one loop how often it turns, as far as is known before a run.

    >>> turns_scope(12)
    'meshwright_turns[12]'
    """
    return f"meshwright_turns[{count}]"


def callees(instruction: Instruction) -> dict[str, str]:
    """Return the computations that an instruction runs, by role: ``body``, ``condition``, ``calls``, …"""
    return dict(_CALLEE.findall(instruction.attributes))


def branches(instruction: Instruction) -> tuple[str, ...]:
    """Return the computations among which a conditional chooses."""
    listed = _BRANCHES.search(instruction.attributes)
    if listed is not None:
        return tuple(name.strip().lstrip("%") for name in listed[1].split(",") if name.strip())
    found = callees(instruction)
    return tuple(found[role] for role in ("true_computation", "false_computation") if role in found)


def loops(module: HloModule) -> dict[str, WhileLoop]:
    """Return the while loops of a module, by the name of their instruction."""
    found = {}
    for name, instruction in module.instructions.items():
        if instruction.opcode == "while":
            inside = callees(instruction)
            found[name] = WhileLoop(
                name=name,
                body=inside.get("body", ""),
                condition=inside.get("condition", ""),
                trip_count=_trip_count(module, instruction, inside),
                told=_KNOWN.search(instruction.attributes) is None
                and _NAMED.search(instruction.op_name) is not None,
            )
    return found


def _trip_count(module: HloModule, loop: Instruction, inside: Mapping[str, str]) -> int | None:
    known = _KNOWN.search(loop.attributes)
    if known is not None:
        return int(known[1])
    named = _NAMED.search(loop.op_name)
    if named is not None:
        return int(named[1])
    body, condition = inside.get("body"), inside.get("condition")
    if body is None or condition is None or not {body, condition} <= set(module.computations):
        return None
    if not loop.operands:
        return None
    state = _Evaluator(module, None).of(loop.operands[0])
    for trip_count in range(MOST_ITERATIONS):
        going = _Evaluator(module, state).of(module.computations[condition].root)
        if not isinstance(going, int):
            return None
        if not going:
            return trip_count
        after = _Evaluator(module, state).of(module.computations[body].root)
        if after == state:
            return None  # the condition depends on something that is not followed here
        state = after
    return None


class _Evaluator:
    """Values of a computation's instructions, as far as they are whole numbers.

    `known` are values by instruction; a parameter that is not among them has the value `state`.
    """

    def __init__(self, module: HloModule, state: _Value, known: dict[str, _Value] | None = None) -> None:
        self._module = module
        self._state = state
        self._known = {} if known is None else known

    def of(self, name: str) -> _Value:
        if name not in self._known:
            self._known[name] = None  # ends the recursion where an instruction depends on itself
            self._known[name] = self._read(self._module.instructions.get(name))
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
        if opcode in _UNCHANGED:
            return self.of(operands[0]) if operands else None
        if opcode in ("fusion", "call"):
            return self._called(instruction)
        return self._computed(instruction, [self.of(operand) for operand in operands])

    def _scalar(self, name: str) -> _Value:
        """Return the value of a whole number or of a tuple; arrays are not followed."""
        instruction = self._module.instructions.get(name)
        if instruction is None or not instruction.shape.startswith(("(", "s", "u", "pred")):
            return None
        if "[]" not in instruction.shape and not instruction.shape.startswith("("):
            return None
        return self.of(name)

    def _called(self, instruction: Instruction) -> _Value:
        inner = callees(instruction).get("calls") or callees(instruction).get("to_apply")
        computation = self._module.computations.get(inner or "")
        if computation is None or "[]" not in instruction.shape:
            return None
        known: dict[str, _Value] = {}
        for name in computation.instructions:
            parameter = self._module.instructions[name]
            if parameter.opcode == "parameter":
                place = int(parameter.literal or 0)
                if place < len(instruction.operands):
                    known[name] = self._scalar(instruction.operands[place])
        return _Evaluator(self._module, None, known).of(computation.root)

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


def _literal(text: str) -> int | None:
    text = text.strip()
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return int(text)
    except ValueError:
        return None


def run_counts(
    module: HloModule, found: Mapping[str, WhileLoop], taken: Callable[[Instruction], str | None]
) -> dict[str, float]:
    """Return how often each computation that has a schedule of its own runs in a step, over all its callers.

    Computations inside of fusions and asynchronous wrappers have none: they run as one instruction.

    Args:
      module: the program.
      found: its loops, as `loops` returns them; one of unknown trip count is counted as running once.
      taken: names the branch that a conditional is counted as running.
    """
    runs: dict[str, float] = {}
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in module.computations:
            return
        seen.add(name)
        for callee, _ in _called(module, name, found, taken):
            visit(callee)
        order.append(name)

    visit(module.entry)
    runs[module.entry] = 1.0
    for name in reversed(order):  # callers before what they call
        for callee, times in _called(module, name, found, taken):
            runs[callee] = runs.get(callee, 0.0) + runs.get(name, 0.0) * times
    return runs


def _called(
    module: HloModule,
    name: str,
    found: Mapping[str, WhileLoop],
    taken: Callable[[Instruction], str | None],
) -> list[tuple[str, float]]:
    """Return the computations that one run of a computation runs, each with how often."""
    called: list[tuple[str, float]] = []
    for member in module.computations[name].instructions:
        instruction = module.instructions[member]
        opcode = instruction.opcode
        if opcode == "while":
            loop = found[member]
            trips = 1 if loop.trip_count is None else loop.trip_count
            called += [(loop.body, trips), (loop.condition, trips + 1)]
        elif opcode == "call":
            called += [(callee, 1.0) for callee in callees(instruction).values()]
        elif opcode == "conditional" and (branch := taken(instruction)) is not None:
            called.append((branch, 1.0))
    return [(callee, times) for callee, times in called if callee in module.computations]
