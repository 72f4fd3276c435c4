"""Seconds of one instruction on its device: the compiler's own cycles, or a roofline where it gives none.

libtpu writes ``estimated_cycles`` for every fusion, product and copy: cycles of one core, both cores of a
megacore working at once on their halves (`chips.toml` has the clocks). Some say too much. Those of products
give way to its schedule where that is known (`schedule.py`), else to the share of them that schedules take on
their chip. Those of elementwise work are as many for bfloat16 as for float32, and for an array that is only
read as for one that is written too: they give way to what the arrays take at the memory's rate that they
stand for in float32, but to no less than half of them, and not where memory explains so little that the rest
must be arithmetic. What has none (Pallas kernels, everything on a GPU) takes as long as its flops at the
chip's peak or its bytes at the memory's rate, whichever is more, both at the efficiency that the chip's
calibration has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..cost.calibration import Calibration
from ..hardware.chip import Chip
from ..hlo.shapes import HOST_SPACE, leaves, parse_shape
from ..hlo.text import Instruction, Program
from .flops import attention_flops, flops, moved_bytes
from .schedule import scheduled_cycles

# Of the cycles of elementwise work: the part that stays, and the least part that memory must explain.
_KEPT, _EXPLAINED = 0.5, 0.25
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_NAMES = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"})
_NUMBERS = frozenset({"partition-id", "replica-id"})
_ORDER = frozenset({"opt-barrier", "optimization-barrier", "add-dependency"})
_ELSEWHERE = frozenset({"while", "conditional", "call", "send", "recv", "infeed", "outfeed"})
_FREE = _NAMES | _NUMBERS | _ORDER | _ELSEWHERE
#: Custom calls that only say something to the compiler.
_NOTES = frozenset(
    {
        "AllocateBuffer",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "PrepareAsyncCallDone",
        "PrepareAsyncCallStart",
        "Sharding",
    }
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an instruction costs: seconds, by ``cycles``, ``schedule``, ``roofline``, or ``unknown``."""

    seconds: float
    basis: str


NOTHING = Work(seconds=0.0, basis="cycles")


def target(instruction: Instruction) -> str:
    """Return the name of what a custom call calls, or nothing."""
    found = _TARGET.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    return found[1] if found else ""


def rendezvous(instruction: Instruction) -> str:
    """Return the name under which a transfer between slices is known on both sides, or nothing."""
    found = _RENDEZVOUS.search(instruction.attributes)
    return found[1] if found and "megascale" in instruction.attributes else ""


def work(
    program: Program,
    instruction: Instruction,
    chip: Chip,
    calibration: Calibration,
    bundles: Mapping[str, int],
) -> Work:
    """Return what one run of `instruction` costs its device; nothing for what only moves names about.

    `bundles` are the lengths of the schedules that are known, by instruction.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-start", "-done", "-update")) or target(instruction) in _NOTES:
        return NOTHING
    cycles = _CYCLES.search(instruction.attributes)
    if cycles is not None and chip.clock_hz:
        return _by_cycles(program, instruction, int(cycles[1]), chip, calibration, bundles)
    done, moved = flops(program, instruction), moved_bytes(program, instruction)
    if instruction.collective is not None:
        if not done:
            return NOTHING
        moved = 0.0  # a product with a piece of a collective in it, whose buffers are not its own
    peak = chip.peak_flops("bfloat16") or float("inf")
    if done and _in_f32(program, instruction):
        peak = chip.peak_flops("float32") or peak
    rate = (chip.hbm_bytes_per_second or float("inf")) * calibration.memory_efficiency
    share = calibration.matmul_efficiency
    if attention_flops(program, instruction):
        share = calibration.attention_efficiency
    seconds = max(done / (peak * share), moved / rate)
    unknown = target(instruction) == "tpu_custom_call" and not done
    return Work(seconds=seconds, basis="unknown" if unknown else "roofline")


def _by_cycles(
    program: Program,
    instruction: Instruction,
    estimated: int,
    chip: Chip,
    calibration: Calibration,
    bundles: Mapping[str, int],
) -> Work:
    """Return the compiler's own seconds: of a product by its schedule, or by what schedules take on its chip.

    Never less than the matrix units need at the chip's peak, or its memory for going over the arrays once; of
    elementwise work what its arrays take at the memory's rate, which is between half and all of its cycles.
    """
    assert chip.clock_hz
    seconds = estimated / chip.clock_hz
    if not (done := flops(program, instruction)):
        if instruction.opcode == "fusion":
            rate = (chip.hbm_bytes_per_second or float("inf")) * calibration.fusion_efficiency
            by_memory = moved_bytes(program, instruction) * _padding(program, instruction) / rate
            if by_memory > _EXPLAINED * seconds:
                seconds = min(seconds, max(_KEPT * seconds, by_memory))
        return Work(seconds=seconds, basis="cycles")
    scheduled = scheduled_cycles(instruction, bundles, chip)
    least = max(
        seconds * calibration.product_cycles if scheduled is None else scheduled / chip.clock_hz,
        done / (chip.peak_flops("bfloat16") or float("inf")),
        moved_bytes(program, instruction) / (chip.hbm_bytes_per_second or float("inf")),
    )
    by_schedule = scheduled is not None and least < seconds
    return Work(seconds=min(seconds, least), basis="schedule" if by_schedule else "cycles")


def _padding(program: Program, instruction: Instruction) -> float:
    """Return how much more its arrays take with their tiles whole."""
    names = [name for name in instruction.operands if name in program.instructions]
    shapes = [instruction.shape, *(program.instructions[name].shape for name in names)]
    arrays = [array for shape in shapes for array in leaves(parse_shape(shape))]
    unpadded = sum(array.bytes for array in arrays)
    return sum(array.padded_bytes for array in arrays) / unpadded if unpadded else 1.0


def _in_f32(program: Program, instruction: Instruction) -> bool:
    names = instruction.operands
    return bool(names) and all(
        program.instructions[name].shape.startswith("f32")
        for name in names[:2]
        if name in program.instructions
    )


def host_bytes(program: Program, instruction: Instruction) -> float:
    """Return the bytes that an instruction moves between the device and its host, 0 if none.

    A copy has one side in host memory (``S(5)``); of a slice or an update there only the part goes over.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("send", "infeed", "outfeed") and "is_host_transfer=true" in instruction.attributes:
        return 0.0 if rendezvous(instruction) else _first_bytes(program, instruction)
    if opcode in ("fusion", "async", "call"):
        return _fused_host_bytes(program, instruction)
    if opcode not in ("copy", "dynamic-slice", "dynamic-update-slice", "slice"):
        return 0.0
    if f"S({HOST_SPACE})" not in instruction.shape and not any(
        f"S({HOST_SPACE})" in program.instructions[name].shape
        for name in instruction.operands
        if name in program.instructions
    ):
        return 0.0
    arrays = leaves(parse_shape(instruction.shape))
    if opcode == "copy":
        spaces = {array.space == HOST_SPACE for array in arrays[:2]}
        if instruction.opcode == "copy":
            spaces |= {
                array.space == HOST_SPACE
                for array in leaves(parse_shape(program.instructions[instruction.operands[0]].shape))
            }
        return arrays[0].padded_bytes if len(spaces) == 2 else 0.0
    if opcode == "dynamic-update-slice":
        return _bytes(program, instruction.operands[1]) if len(instruction.operands) > 1 else 0.0
    return min((array.padded_bytes for array in arrays if array.elements > 1), default=0.0)


def _fused_host_bytes(program: Program, instruction: Instruction) -> float:
    """A GPU's transfer is a fusion of one copy, slice or update; it counts as what is inside."""
    inside = program.inside(instruction)
    if inside is None:
        return 0.0
    moved = 0.0
    for name in inside.instructions:
        inner = program.instructions[name]
        if inner.opcode in ("copy", "dynamic-slice", "dynamic-update-slice", "slice"):
            moved += host_bytes(program, inner)
    return moved


def to_host(program: Program, instruction: Instruction) -> bool:
    """Whether a transfer goes from the device to its host; the link carries both ways at once."""
    if instruction.opcode in ("send", "outfeed"):
        return True
    inside = program.inside(instruction)
    if inside is not None:
        return f"S({HOST_SPACE})" in program.instructions[inside.root].shape
    if "slice" in instruction.opcode:
        return instruction.opcode.startswith("dynamic-update-slice")
    arrays = leaves(parse_shape(instruction.shape))
    return bool(arrays) and arrays[0].space == HOST_SPACE


def _first_bytes(program: Program, instruction: Instruction) -> float:
    return _bytes(program, instruction.operands[0]) if instruction.operands else 0.0


def _bytes(program: Program, name: str) -> float:
    found = program.instructions.get(name)
    return 0.0 if found is None else sum(array.padded_bytes for array in leaves(parse_shape(found.shape)))
