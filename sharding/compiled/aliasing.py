"""Operands whose buffers an instruction may write its result into, by XLA's rules of buffer assignment."""

from __future__ import annotations

import re

from ..hlo.shapes import leaves, parse_shape
from ..hlo.text import HloModule, Instruction

_ALIASES = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}")
_MAY_SHARE = '"aliasing_operands":{"lists":['
_INDICES = re.compile(r'"indices":\["(\d+)","(\d+)"\]')
_OUTPUT_ALIASES = re.compile(r"\boutput_to_operand_aliasing=\{(.*?\}\)?)\}(?:,|$)")
_ARITHMETIC = frozenset({"add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "power"})
_FUNCTIONS = frozenset({"exponential", "tanh", "sqrt", "rsqrt", "log", "abs", "floor", "ceil", "sign"})
_CHOICES = frozenset({"select", "convert", "compare", "clamp", "and", "or", "not", "xor"})
# Opcodes that may write their result over an operand; so may fusions of them.
_ELEMENTWISE = _ARITHMETIC | _FUNCTIONS | _CHOICES | {"all-reduce", "all-reduce-start"}


class Aliasing:
    """Buffers that instructions of a module may share with operands on a platform, such as ``tpu``."""

    def __init__(self, module: HloModule, platform: str) -> None:
        self._module = module
        self._platform = platform

    def of(self, instruction: Instruction, operands: int) -> dict[int, list[tuple[int, bool]]]:
        """Return output → operands whose buffer it may take, first choice first, and whether it always does.

        Outputs and operands are counted in arrays; `operands` is how many arrays the operands have.
        """
        found: dict[int, list[tuple[int, bool]]] = {}
        if instruction.opcode == "dynamic-update-slice":
            found[0] = [(0, True)]
        stated = _OUTPUT_ALIASES.search(instruction.attributes)
        if stated is not None:
            for output, operand, _ in _ALIASES.findall(stated[1] + ")"):
                found.setdefault(int(output or 0), []).append((int(operand), True))
        _, listed, pairs = instruction.attributes.partition(_MAY_SHARE)
        if listed:
            for operand, output in _INDICES.findall(pairs):
                found.setdefault(int(output) - operands, []).append((int(operand), False))
        elif self._platform != "tpu":
            inner = self.updated(instruction)
            if inner is not None:
                found.setdefault(0, []).append((inner, True))
            elif self._elementwise(instruction):
                for place in range(len(leaves(parse_shape(instruction.shape)))):
                    found.setdefault(place, []).extend((operand, False) for operand in range(operands))
        return found

    def _elementwise(self, instruction: Instruction) -> bool:
        """Whether each element of the result depends on the same element of each operand alone."""
        inside = self._module.inside(instruction) if instruction.opcode == "fusion" else None
        if inside is None:
            return instruction.opcode in _ELEMENTWISE
        opcodes = {self._module.instructions[name].opcode for name in inside.instructions}
        return opcodes <= _ELEMENTWISE | {"parameter", "constant", "bitcast", "broadcast", "tuple"}

    def updated(self, instruction: Instruction) -> int | None:
        """Return the operand that a fusion updates in place, None if its root is not such an update."""
        inside = self._module.inside(instruction)
        if inside is None or instruction.opcode not in ("fusion", "fusion-start"):
            return None
        name: str | None = inside.root
        while name is not None:
            inner = self._module.instructions[name]
            if inner.opcode == "parameter":
                return int(inner.literal or 0)
            if inner.opcode not in ("bitcast", "dynamic-update-slice", "convert"):
                return None
            name = inner.operands[0] if inner.operands else None
        return None


def entry_aliases(header: str) -> list[tuple[int, int]]:
    """Return (output, parameter) of the module's ``input_output_alias``, for outputs that are no tuples."""
    begin = header.find("input_output_alias={")
    if begin < 0:
        return []
    end = header.find("entry_computation_layout", begin)
    return [
        (int(output.split(",")[0] or 0), int(parameter))
        for output, parameter, _ in _ALIASES.findall(header[begin : end if end > 0 else None])
    ]
