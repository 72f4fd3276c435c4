"""Source lines of instructions: the innermost frame of the user's own code, outside of any library."""

from __future__ import annotations

import re
from pathlib import Path

from .text import HloModule, Instruction, SourceLine

# Installed packages, the standard library and frozen modules.
_LIBRARY = re.compile(r"(^|[/\\])(site-packages|dist-packages|lib[/\\]python3[^/\\]*)[/\\]|^<frozen ")
# This package's transforms, runtime and command, wherever they are installed.
_OWN = re.compile(r"(^|[/\\])(meshwright[/\\](sharding|runtime)[/\\]|(bin|Scripts)[/\\]meshwright[^/\\]*$)")
_HERE = Path(__file__).resolve().parents[1]
_FOLDERS = (f"{_HERE}/", f"{_HERE.with_name('runtime')}/")
# Code of the process that compiles: it is in the frames of every instruction and asks for none of them.
_COMPILER = f"{_HERE / 'verify'}/"


def user_line(module: HloModule, instruction: Instruction) -> SourceLine | None:
    """Return the user's line that asked for `instruction`, or the innermost line if none is the user's."""
    lines = [line for line in module.frames.get(instruction.frame or 0, ()) if not _compiles(line.file)]
    for line in lines:
        if not is_library(line.file):
            return line
    if lines:
        return lines[0]
    return None if instruction.source is None or _compiles(instruction.source.file) else instruction.source


def _compiles(file: str) -> bool:
    """Whether a file belongs to the process that compiles, or is frozen into Python."""
    return file.startswith((_COMPILER, "<frozen "))


def is_library(file: str) -> bool:
    """Whether a file belongs to an installed package, to Python or to this package."""
    return bool(_LIBRARY.search(file) or _OWN.search(file)) or file.startswith(_FOLDERS)


def nearest_line(module: HloModule, name: str, depth: int = 4) -> SourceLine | None:
    """Return the source line of an instruction, or of the nearest fused instruction or operand that has one.

    Instructions that the compiler adds (copies, the partitioner's gathers) often have none of their own.
    """
    instruction = module.instructions.get(name)
    if instruction is None:
        return None
    line = user_line(module, instruction)
    if line is not None:
        return line
    if (inside := module.inside(instruction)) is not None:
        for inner in reversed(inside.instructions):
            line = user_line(module, module.instructions[inner])
            if line is not None:
                return line
    if depth:
        for operand in instruction.operands:
            line = nearest_line(module, operand, depth - 1)
            if line is not None:
                return line
    return None
