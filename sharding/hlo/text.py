"""HLO modules, read from the text that ``compiled.as_text()`` gives: instructions, source lines, collectives.

Nothing here runs JAX.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from .replica_groups import Groups, parse_pairs, parse_replica_groups

#: XLA's opcodes for communication between devices, and their names in plans and reports.
COLLECTIVES = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "ragged_all_to_all",
    "collective-permute": "collective_permute",
    "collective-broadcast": "collective_broadcast",
}

_HEADER = re.compile(r"^HloModule\s+([^\s,]+)")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([^\s(]+)\s*\(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_APPLIES = re.compile(r"\bto_apply=%?([\w.\-]+)")
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_SOURCE = re.compile(r'\bsource_file="((?:[^"\\]|\\.)*)"(?:\s+source_line=(\d+))?')
# On a TPU a reduce-scatter is a fusion of an all-reduce and a slice; the whole sum is never stored. Its
# configuration says so once it is machine code, and the name of what it calls before.
_SCATTERS, _SCATTERS_SCHEDULED = "AllReduceScatterFusion", "all-reduce-scatter"
_TABLE_ROW = re.compile(r"^(\d+)\s+(.*)$")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclass(frozen=True, kw_only=True)
class SourceLine:
    """A line of source code that an instruction came from; `function` may be empty."""

    file: str
    line: int
    function: str = ""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Communication between devices: `groups` are groups of devices, for a permute (source, target) pairs."""

    kind: str
    groups: Groups


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction of a module.

    `shape` is that of the result, as written. `operand` is the first name among the arguments, `operands` all
    of them; `literal` is the text between the parentheses of a constant or parameter, and `attributes` what
    follows them. `calls` is the computation of a fusion, a call or an asynchronous wrapper. `collective` is
    set on the operation itself, on the start and the done of an asynchronous one, and on a fusion or wrapper
    that contains one. `frame` is the number of its innermost frame (`HloModule.frames`).
    """

    name: str
    opcode: str
    computation: str
    operand: str | None
    calls: str | None
    op_name: str
    source: SourceLine | None
    collective: Collective | None
    shape: str = ""
    operands: tuple[str, ...] = ()
    attributes: str = ""
    literal: str = ""
    frame: int | None = None


@dataclass(frozen=True, kw_only=True)
class Computation:
    """Names of a computation's instructions in the order of the schedule, and of its root."""

    name: str
    instructions: tuple[str, ...]
    root: str


@dataclass(frozen=True, kw_only=True)
class HloModule:
    """An optimised and scheduled program as XLA writes it.

    `entry` is the name of the entry computation; `instructions` and `computations` are by name. `header` is
    the first line. `frames` maps the number of a frame to its lines, from the innermost outwards.
    """

    name: str
    entry: str
    num_devices: int
    instructions: Mapping[str, Instruction]
    computations: Mapping[str, Computation] = field(default_factory=dict)
    header: str = ""
    frames: Mapping[int, tuple[SourceLine, ...]] = field(default_factory=dict)

    def inside(self, instruction: Instruction) -> Computation | None:
        """Return the computation of a fusion or an asynchronous wrapper, None for other instructions."""
        return None if instruction.calls is None else self.computations.get(instruction.calls)


def parse_hlo(text: str) -> HloModule:
    r"""Return the module that `text` is.

    >>> module = parse_hlo(
    ...     "HloModule double\n\nENTRY %main (x: f32[4]) -> f32[4] {\n"
    ...     "  %x = f32[4]{0} parameter(0)\n  ROOT %sum = f32[4]{0} add(%x, %x)\n}\n"
    ... )
    >>> module.computations["main"].root, module.instructions["sum"].operands
    ('sum', ('x', 'x'))

    Raises:
      ValueError: `text` is not the text of an HLO module.
    """
    header = _HEADER.match(text)
    if header is None:
        raise ValueError(f"not the text of an HLO module: it begins with {text[:40]!r}")
    first_line = text.partition("\n")[0]
    num_devices = _header_int(first_line, "replica_count") * _header_int(first_line, "num_partitions")
    frames = _read_frames(text)
    computation = entry = ""
    instructions: dict[str, Instruction] = {}
    members: dict[str, list[str]] = {}
    roots: dict[str, str] = {}
    for line in _whole_lines(text):
        if (match := _INSTRUCTION.match(line)) is not None:
            instruction = _read_instruction(match[2], match[3], computation, frames, num_devices)
            if instruction is not None:
                instructions[instruction.name] = instruction
                members.setdefault(computation, []).append(instruction.name)
                if match[1]:
                    roots[computation] = instruction.name
        elif (match := _COMPUTATION.match(line)) is not None:
            computation = match[2]
            entry = computation if match[1] else entry
    _spread_collectives(instructions)
    return HloModule(
        name=header[1],
        entry=entry,
        num_devices=num_devices,
        instructions=instructions,
        computations={
            name: Computation(name=name, instructions=tuple(names), root=roots.get(name, names[-1]))
            for name, names in members.items()
        },
        header=first_line,
        frames=frames,
    )


def _whole_lines(text: str) -> Iterator[str]:
    """Yield lines, those of one instruction joined: the metadata of a Pallas kernel takes three."""
    held = ""
    for line in text.splitlines():
        if line.startswith(('"', "}}")):
            held += line
            continue
        yield held
        held = line
    yield held


def collective_kind(opcode: str) -> str | None:
    """Return the name (`COLLECTIVES`) of a communication opcode or its ``-start`` or ``-done``, else None."""
    return COLLECTIVES.get(opcode.removesuffix("-start").removesuffix("-done"))


def _header_int(line: str, key: str) -> int:
    match = re.search(rf"\b{key}=(\d+)", line)
    return int(match[1]) if match else 1


def _read_instruction(
    name: str,
    rest: str,
    computation: str,
    frames: Mapping[int, tuple[SourceLine, ...]],
    num_devices: int,
) -> Instruction | None:
    shape_end = _shape_end(rest)
    opcode = _OPCODE.match(rest, shape_end)
    if opcode is None:
        return None
    arguments = rest[opcode.end() :]
    inside, attributes = _split_arguments(arguments)
    operands = tuple(_OPERAND.findall(inside))
    # What a call applies is run as such; what a reduction applies only combines two elements.
    runs = _APPLIES if opcode[1] in ("call", "call-start") else _CALLS
    operand, calls, op_name = _OPERAND.search(arguments), runs.search(arguments), _OP_NAME.search(arguments)
    frame = _FRAME.search(attributes)
    return Instruction(
        name=name,
        opcode=opcode[1],
        computation=computation,
        operand=operand[1] if operand else None,
        calls=calls[1] if calls else None,
        op_name=op_name[1] if op_name else "",
        source=_source(arguments, frames),
        collective=_collective(opcode[1], arguments, num_devices),
        shape=rest[:shape_end],
        operands=operands,
        attributes=attributes,
        literal="" if operands else inside,
        frame=int(frame[1]) if frame else None,
    )


def _split_arguments(text: str) -> tuple[str, str]:
    """Split what follows ``opcode(`` at the parenthesis that closes it."""
    end = text.find(")")
    if "(" not in text[: max(end, 0)]:
        return text[: max(end, 0)], text[end + 1 :]
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _shape_end(text: str) -> int:
    """Return where the result's shape ends: a tuple's shape holds spaces, comments and nested parentheses."""
    if not text.startswith("("):
        return max(text.find(" "), 0)
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _collective(opcode: str, arguments: str, num_devices: int) -> Collective | None:
    kind = collective_kind(opcode)
    if kind is None:
        return None
    if (pairs := arguments.find("source_target_pairs=")) >= 0:
        return Collective(kind=kind, groups=parse_pairs(arguments[pairs + len("source_target_pairs=") :]))
    if (groups := arguments.find("replica_groups=")) >= 0:
        written = arguments[groups + len("replica_groups=") :]
        return Collective(kind=kind, groups=parse_replica_groups(written, num_devices=num_devices))
    return None


def _spread_collectives(instructions: dict[str, Instruction]) -> None:
    """Set the collective of each wrapper from the one inside it, then of each done from its start."""
    inside = {i.computation: i.collective for i in instructions.values() if i.collective is not None}
    for name, instruction in list(instructions.items()):
        wraps = instruction.opcode == "fusion" or instruction.opcode.endswith("-start")
        if wraps and instruction.collective is None and instruction.calls in inside:
            collective = inside[instruction.calls or ""]
            called = instruction.calls or ""
            if _SCATTERS in instruction.attributes or called.startswith(_SCATTERS_SCHEDULED):
                collective = replace(collective, kind="reduce_scatter")
            instructions[name] = replace(instruction, collective=collective)
    for name, instruction in list(instructions.items()):
        start = instruction
        while start.collective is None and start.opcode.endswith(("-done", "-update")) and start.operand:
            following = instructions.get(start.operand)
            if following is None:
                break
            start = following
        if start.collective is not None and start is not instruction:
            instructions[name] = replace(instruction, collective=start.collective)


def _source(arguments: str, frames: Mapping[int, tuple[SourceLine, ...]]) -> SourceLine | None:
    if (frame := _FRAME.search(arguments)) is not None:
        lines = frames.get(int(frame[1]))
        return lines[0] if lines else None
    if (written := _SOURCE.search(arguments)) is not None:
        return SourceLine(file=written[1], line=int(written[2] or 0))
    return None


def _read_frames(text: str) -> dict[int, tuple[SourceLine, ...]]:
    """Return the lines of each frame, innermost first, from the tables at the top of the text."""
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    current: str | None = None
    for line in text.splitlines():
        if line in tables:
            current = line
        elif current is not None and (row := _TABLE_ROW.match(line)) is not None:
            tables[current][int(row[1])] = row[2]
        elif line.endswith("{"):
            break  # the first computation: the tables stand before it

    lines: dict[int, SourceLine] = {}
    parents: dict[int, int] = {}
    for number, row in tables["StackFrames"].items():
        fields = _fields(row)
        location = _fields(tables["FileLocations"].get(fields.get("file_location_id", 0), ""))
        file = tables["FileNames"].get(location.get("file_name_id", 0))
        parents[number] = fields.get("parent_frame_id", 0)
        if file is not None:
            function = tables["FunctionNames"].get(location.get("function_name_id", 0), "")
            lines[number] = SourceLine(
                file=file.strip('"'), line=location.get("line", 0), function=function.strip('"')
            )
    # Some versions write the parent's number plus one, by which the outermost frame is its own parent.
    shift = any(number == parent for number, parent in parents.items())
    found: dict[int, tuple[SourceLine, ...]] = {}
    for number, line in lines.items():
        outer = found.get(parents[number] - shift, ())
        found[number] = (line, *outer)
    return found


def _fields(row: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}
