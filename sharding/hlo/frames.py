"""Which line is the user's: of the frames an instruction came from, the innermost that no library holds."""

from __future__ import annotations

import re
from pathlib import Path

from .text import Instruction, Program, SourceLine

# Installed packages, the standard library and frozen modules are nobody's model.
_LIBRARY = re.compile(r"(^|[/\\])(site-packages|dist-packages|lib[/\\]python3[^/\\]*)[/\\]|^<frozen ")
# The transforms and the runtime stand between a model and its program, wherever they are installed.
_OWN = re.compile(r"(^|[/\\])meshwright[/\\](sharding|runtime)[/\\]")
_HERE = Path(__file__).resolve().parents[1]
_FOLDERS = (f"{_HERE}/", f"{_HERE.with_name('runtime')}/")
# The process that compiles stands in every frame of its program and asks for nothing.
_COMPILER = f"{_HERE / 'verify'}/"


def user_line(program: Program, instruction: Instruction) -> SourceLine | None:
    """Return the line of the user's program that asked for `instruction`, or the innermost line known."""
    lines = [line for line in program.frames.get(instruction.frame or 0, ()) if not _compiles(line.file)]
    for line in lines:
        if not is_library(line.file):
            return line
    if lines:
        return lines[0]
    return None if instruction.source is None or _compiles(instruction.source.file) else instruction.source


def _compiles(file: str) -> bool:
    """Whether a file is of the process that compiles, or frozen into Python."""
    return file.startswith((_COMPILER, "<frozen "))


def is_library(file: str) -> bool:
    """Whether a file belongs to an installed package or to this one's transforms."""
    return bool(_LIBRARY.search(file) or _OWN.search(file)) or file.startswith(_FOLDERS)


def nearest_line(program: Program, name: str, depth: int = 4) -> SourceLine | None:
    """Return the user's line of an instruction, or of the nearest operand or fused instruction that has one.

    The compiler's own instructions (copies, gathers that the partitioner put in) often carry none.
    """
    instruction = program.instructions.get(name)
    if instruction is None:
        return None
    line = user_line(program, instruction)
    if line is not None:
        return line
    if (inside := program.inside(instruction)) is not None:
        for inner in reversed(inside.instructions):
            line = user_line(program, program.instructions[inner])
            if line is not None:
                return line
    if depth:
        for operand in instruction.operands:
            line = nearest_line(program, operand, depth - 1)
            if line is not None:
                return line
    return None
