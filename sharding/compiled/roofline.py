"""Seconds of one instruction on its device, from the compiler's own cycles or from a roofline.

libtpu writes ``estimated_cycles`` for every fusion, product and copy: cycles of one core, the two cores of a
megacore each working on half (`chips.toml` has the clocks). Some are too high:

- Products: replaced by the length of libtpu's schedule where that is known (`schedule.py`), else multiplied
  by the share of the estimate that schedules take on that chip.
- Elementwise fusions: libtpu estimates as many cycles for bfloat16 as for float32, and for an array that is
  only read as for one that is also written. The time is what the arrays take at the memory's rate, but at
  least half of the cycles; where memory explains less than a quarter of them, the rest must be arithmetic and
  the cycles stand.

An instruction without cycles (Pallas kernels, all of a GPU's) takes its flops at the chip's peak or its bytes
at the memory's rate, whichever is longer, at the efficiencies of the chip's calibration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..cost.calibration import Calibration
from ..cost.compute import attention_share, product_share
from ..cost.grouped import busy_of, streaming_rate
from ..hardware.chip import Chip
from ..hlo.shapes import HOST_SPACE, leaves, parse_shape
from ..hlo.text import HloModule, Instruction
from ..xla.compiler import compiler_for
from .attention import attention_kernel
from .flops import flops, grouped_kernel, moved_bytes, product_sizes, short_sums
from .schedule import scheduled_cycles

# Shares of an elementwise fusion's cycles: the least that stays, and the least that memory must explain.
_KEPT, _EXPLAINED = 0.5, 0.25
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_NAMES = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"})
_NUMBERS = frozenset({"partition-id", "replica-id"})
_ORDER = frozenset({"opt-barrier", "optimization-barrier", "add-dependency"})
_ELSEWHERE = frozenset({"while", "conditional", "call", "send", "recv", "infeed", "outfeed"})
_FREE = _NAMES | _NUMBERS | _ORDER | _ELSEWHERE
#: Custom calls that are notes to the compiler and take no time.
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
class InstructionCost:
    """Seconds of one run of an instruction, and the `basis` that they are estimated on.

    The basis is ``cycles``, ``schedule``, ``roofline``, or ``unknown`` for a kernel that states no cost.
    """

    seconds: float
    basis: str


NO_COST = InstructionCost(seconds=0.0, basis="cycles")


def target(instruction: Instruction) -> str:
    """Return the target of a custom call, empty for other instructions."""
    found = _TARGET.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    return found[1] if found else ""


def rendezvous(instruction: Instruction) -> str:
    """Return the name that both sides of a transfer between slices share, empty for other instructions."""
    found = _RENDEZVOUS.search(instruction.attributes)
    return found[1] if found and "megascale" in instruction.attributes else ""


def instruction_cost(
    module: HloModule,
    instruction: Instruction,
    chip: Chip,
    calibration: Calibration,
    bundles: Mapping[str, int],
    kernels: Mapping[str, Calibration] | None = None,
) -> InstructionCost:
    """Return what one run of `instruction` costs its device, `NO_COST` if it does not compute.

    Collectives and asynchronous copies do not compute: `Timeline` has their seconds.

    Args:
      module: the program of the instruction.
      instruction: one of a schedule, not of the inside of a fusion.
      chip: what the device is.
      calibration: efficiencies of the chip.
      bundles: instruction → length of its schedule, where that is known.
      kernels: kernel of attention → efficiencies with it, of those that have their own.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-start", "-done", "-update")) or target(instruction) in _NOTES:
        return NO_COST
    cycles = _CYCLES.search(instruction.attributes)
    if cycles is not None and chip.clock_hz:
        return _by_cycles(module, instruction, int(cycles[1]), chip, calibration, bundles)
    done, moved = flops(module, instruction), moved_bytes(module, instruction)
    if instruction.collective is not None:
        if not done:
            return NO_COST
        moved = 0.0  # a product merged with a part of a collective, to which the buffers belong
    peak = chip.peak_flops("bfloat16") or float("inf")
    if done and _in_f32(module, instruction):
        peak = (chip.peak_flops("float32") or peak) * calibration.float32_efficiency
    rate = (chip.hbm_bytes_per_second or float("inf")) * calibration.memory_efficiency
    if grouped_kernel(instruction) is not None:
        rate = streaming_rate(chip, calibration)
    reached = peak * _share(module, instruction, chip, calibration, kernels or {}) if done else peak
    seconds = max(done / reached, moved / rate)
    if calibration.short_sum_seconds:
        seconds += short_sums(module, instruction) * calibration.short_sum_seconds
    unknown = target(instruction) == "tpu_custom_call" and not done
    return InstructionCost(seconds=seconds, basis="unknown" if unknown else "roofline")


def _share(
    module: HloModule,
    instruction: Instruction,
    chip: Chip,
    calibration: Calibration,
    kernels: Mapping[str, Calibration],
) -> float:
    """Return the share of the peak that an instruction's products reach, as the Estimate has it."""
    kernel = attention_kernel(module, instruction)
    if kernel is not None:
        own = kernels.get(kernel.kernel, calibration)
        width, keys = np.array([kernel.width]), np.array([kernel.keys])
        reached = float(attention_share(width, keys, own)[0])
        return reached * (own.masked_efficiency if kernel.masked else 1.0)
    if (grouped := grouped_kernel(instruction)) is not None:
        return calibration.matmul_efficiency * busy_of(grouped)
    sizes = product_sizes(module, instruction)
    if sizes is None:
        return calibration.matmul_efficiency
    whole = np.maximum(np.array([sizes]), 1.0)
    return float(product_share(whole, calibration, compiler_for(chip).aligned_elements)[0])


def _by_cycles(
    module: HloModule,
    instruction: Instruction,
    estimated: int,
    chip: Chip,
    calibration: Calibration,
    bundles: Mapping[str, int],
) -> InstructionCost:
    """Return the cost of an instruction of `estimated` cycles, corrected as the module's docstring says.

    A product takes no less than the matrix units need at the chip's peak, and than its arrays take at the
    memory's peak rate.
    """
    assert chip.clock_hz
    seconds = estimated / chip.clock_hz
    if not (done := flops(module, instruction)):
        if instruction.opcode == "fusion":
            rate = (chip.hbm_bytes_per_second or float("inf")) * calibration.fusion_efficiency
            by_memory = moved_bytes(module, instruction) * _padding(module, instruction) / rate
            if by_memory > _EXPLAINED * seconds:
                seconds = min(seconds, max(_KEPT * seconds, by_memory))
        return InstructionCost(seconds=seconds, basis="cycles")
    scheduled = scheduled_cycles(instruction, bundles, chip)
    least = max(
        seconds * calibration.product_cycles if scheduled is None else scheduled / chip.clock_hz,
        done / (chip.peak_flops("bfloat16") or float("inf")),
        moved_bytes(module, instruction) / (chip.hbm_bytes_per_second or float("inf")),
    )
    by_schedule = scheduled is not None and least < seconds
    return InstructionCost(seconds=min(seconds, least), basis="schedule" if by_schedule else "cycles")


def _padding(module: HloModule, instruction: Instruction) -> float:
    """Return the bytes that an instruction's arrays take with padded tiles, over those without padding."""
    names = [name for name in instruction.operands if name in module.instructions]
    shapes = [instruction.shape, *(module.instructions[name].shape for name in names)]
    arrays = [array for shape in shapes for array in leaves(parse_shape(shape))]
    unpadded = sum(array.bytes for array in arrays)
    return sum(array.padded_bytes for array in arrays) / unpadded if unpadded else 1.0


def _in_f32(module: HloModule, instruction: Instruction) -> bool:
    names = instruction.operands
    return bool(names) and all(
        module.instructions[name].shape.startswith("f32") for name in names[:2] if name in module.instructions
    )


def host_bytes(module: HloModule, instruction: Instruction) -> float:
    """Return the bytes that an instruction moves between the device and its host, 0 if none.

    A copy moves its array if only one side is in host memory (``S(5)``); a slice or an update of an array
    there moves the part that it slices or updates.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("send", "infeed", "outfeed") and "is_host_transfer=true" in instruction.attributes:
        return (
            0.0
            if rendezvous(instruction) or not instruction.operands
            else _bytes(module, instruction.operands[0])
        )
    if opcode in ("fusion", "async", "call"):
        return _fused_host_bytes(module, instruction)
    if opcode not in ("copy", "dynamic-slice", "dynamic-update-slice", "slice"):
        return 0.0
    if f"S({HOST_SPACE})" not in instruction.shape and not any(
        f"S({HOST_SPACE})" in module.instructions[name].shape
        for name in instruction.operands
        if name in module.instructions
    ):
        return 0.0
    arrays = leaves(parse_shape(instruction.shape))
    if opcode == "copy":
        spaces = {array.space == HOST_SPACE for array in arrays[:2]}
        if instruction.opcode == "copy":
            spaces |= {
                array.space == HOST_SPACE
                for array in leaves(parse_shape(module.instructions[instruction.operands[0]].shape))
            }
        return arrays[0].padded_bytes if len(spaces) == 2 else 0.0
    if opcode == "dynamic-update-slice":
        return _bytes(module, instruction.operands[1]) if len(instruction.operands) > 1 else 0.0
    return min((array.padded_bytes for array in arrays if array.elements > 1), default=0.0)


def _fused_host_bytes(module: HloModule, instruction: Instruction) -> float:
    """Return the bytes that a fusion moves: on a GPU a transfer is a fusion of one copy, slice or update."""
    inside = module.inside(instruction)
    if inside is None:
        return 0.0
    moved = 0.0
    for name in inside.instructions:
        inner = module.instructions[name]
        if inner.opcode in ("copy", "dynamic-slice", "dynamic-update-slice", "slice"):
            moved += host_bytes(module, inner)
    return moved


def to_host(module: HloModule, instruction: Instruction) -> bool:
    """Whether a transfer goes from the device to its host, rather than back."""
    if instruction.opcode in ("send", "outfeed"):
        return True
    inside = module.inside(instruction)
    if inside is not None:
        return f"S({HOST_SPACE})" in module.instructions[inside.root].shape
    if "slice" in instruction.opcode:
        return instruction.opcode.startswith("dynamic-update-slice")
    arrays = leaves(parse_shape(instruction.shape))
    return bool(arrays) and arrays[0].space == HOST_SPACE


def _bytes(module: HloModule, name: str) -> float:
    found = module.instructions.get(name)
    return 0.0 if found is None else sum(array.padded_bytes for array in leaves(parse_shape(found.shape)))
