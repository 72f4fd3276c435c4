"""Flops of the products in an instruction, and the bytes that it reads and writes.

A product is counted from its shapes: a ``dot`` has twice the output's elements times the contracted size. A
``convolution`` (libtpu writes every product as one, often with batch dimensions as windows) has twice the
pairs of an output element and a window element that fall on an input, rather than on padding or between
dilated inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache

from ..hlo.shapes import Array, leaves, parse_shape, total_bytes
from ..hlo.text import HloModule, Instruction
from ..ops.products import ROWS
from .attention import attention_kernel

_CONTRACTING = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
_BATCHED = re.compile(r"\blhs_batch_dims=\{([\d,]*)\}")
_GEMM_BATCHED = re.compile(r'"lhs_batch_dimensions":\[([^\]]*)\]')
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")
_GROUPS = re.compile(r"\b(feature_group_count|batch_group_count)=(\d+)")
_GEMM = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_KERNEL_FLOPS = re.compile(r'"flops":"?(\d+)')
_ROWS = re.compile(rf"\b{ROWS}\[(\d+)\]")
_MEGABLOX = re.compile(r"\bt?gmm\b")
_KERNEL_BYTES = re.compile(r'"bytes_accessed":"?(\d+)')

# Opcodes that read only a part of their operand.
_SLICES = frozenset({"dynamic-slice", "slice"})
_PARTS = _SLICES | {"gather"}
_THROUGH = frozenset({"bitcast", "copy", "convert", "reshape", "transpose"})


def flops(module: HloModule, instruction: Instruction) -> float:
    """Return the flops of all products in one run of an instruction, those inside its fusion included."""
    if instruction.opcode == "dot":
        return _dot(module, instruction)
    if instruction.opcode == "convolution":
        return _convolution(module, instruction)
    if instruction.opcode == "custom-call":
        return _custom(module, instruction)
    inside = module.inside(instruction)
    if inside is not None and instruction.opcode in ("fusion", "fusion-start"):
        return sum(flops(module, module.instructions[name]) for name in inside.instructions)
    return 0.0


def short_sums(module: HloModule, instruction: Instruction) -> float:
    """Return how many numbers of 16 bits a scatter adds up, those inside of a fusion included."""
    if instruction.opcode == "scatter":
        array = _array(module, instruction.operands[-1])
        return float(array.elements) if instruction.shape.lstrip("(").startswith(("bf16", "f16")) else 0.0
    inside = module.inside(instruction)
    if inside is None or instruction.opcode not in ("fusion", "fusion-start"):
        return 0.0
    return sum(short_sums(module, module.instructions[name]) for name in inside.instructions)


def product_sizes(module: HloModule, instruction: Instruction) -> tuple[float, float, float] | None:
    """Return rows, columns and contraction of an instruction's largest product, None if it is no plain one.

    A library's product and those of a fusion are; convolutions and kernels are not.
    """
    inside = module.inside(instruction)
    if inside is not None and instruction.opcode in ("fusion", "fusion-start"):
        dots = [module.instructions[name] for name in inside.instructions]
        dots = [dot for dot in dots if dot.opcode == "dot"]
        largest = max(dots, key=lambda dot: _dot(module, dot), default=None)
        return None if largest is None else product_sizes(module, largest)
    if instruction.opcode == "dot":
        found, batched = _CONTRACTING.search(instruction.attributes), _BATCHED
    elif instruction.opcode == "custom-call":
        found, batched = _GEMM.search(instruction.attributes), _GEMM_BATCHED
    else:
        return None
    if found is None or len(instruction.operands) < 2:
        return None
    left, right = (_array(module, name) for name in instruction.operands[:2])
    batch = batched.search(instruction.attributes)
    contraction = math.prod(left.dims[int(d)] for d in re.findall(r"\d+", found[1]))
    times = math.prod(left.dims[int(d)] for d in re.findall(r"\d+", batch[1])) if batch else 1
    each = max(contraction * times, 1)
    return left.elements / each, right.elements / each, float(contraction)


def moved_bytes(module: HloModule, instruction: Instruction) -> float:
    """Return the bytes that an instruction reads and writes; a fusion may read a part of an operand."""
    stated = _KERNEL_BYTES.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    if stated is not None:
        return _of_even_rows(module, instruction, float(stated[1]))
    if instruction.calls in module.computations and instruction.opcode in ("fusion", "fusion-start"):
        return _fusion_bytes(module, instruction)
    result = _bytes(instruction)
    if instruction.opcode in _PARTS:
        return 2.0 * result
    if instruction.opcode == "dynamic-update-slice" and len(instruction.operands) > 1:
        return 2.0 * _bytes(module.instructions.get(instruction.operands[1]))
    return result + sum(_bytes(module.instructions.get(operand)) for operand in instruction.operands)


def _bytes(instruction: Instruction | None) -> float:
    return 0.0 if instruction is None else total_bytes(parse_shape(instruction.shape))


def _array(module: HloModule, name: str) -> Array:
    return leaves(parse_shape(module.instructions[name].shape))[0]


def _dot(module: HloModule, dot: Instruction) -> float:
    left = _array(module, dot.operands[0])
    contracted = _CONTRACTING.search(dot.attributes)
    dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
    out = leaves(parse_shape(dot.shape))[0]
    return 2.0 * out.elements * math.prod(left.dims[d] for d in dims)


def _custom(module: HloModule, call: Instruction) -> float:
    """Return the flops of a custom call: a library's product, or a kernel by its author's estimate."""
    # First, as cuDNN's settings name the contractions of the products inside, too.
    attention = attention_kernel(module, call)
    if attention is not None and attention.kernel != "splash":
        return attention.flops
    gemm = _GEMM.search(call.attributes)
    if gemm is not None and call.operands:
        left = _array(module, call.operands[0])
        dims = [int(d) for d in re.findall(r"\d+", gemm[1])]
        out = leaves(parse_shape(call.shape))[0]
        return 2.0 * out.elements * math.prod(left.dims[d] for d in dims)
    rows = _ROWS.search(call.op_name)
    if rows is not None:
        return _grouped(module, call, int(rows[1]))
    stated = _KERNEL_FLOPS.search(call.attributes)
    if stated is not None:
        return float(stated[1])
    return 0.0 if attention is None else attention.flops


def _grouped(module: HloModule, call: Instruction, rows: int) -> float:
    """Return the flops of a kernel of grouped rows, of which it multiplies `rows`; it has room for more.

    Its result is rows ``[room, out]`` of operands ``[room, in]``, or matrices ``[groups, in, out]``.
    """
    out = leaves(parse_shape(call.shape))[0]
    if len(out.dims) == 3:
        return 2.0 * rows * out.dims[1] * out.dims[2]
    shapes = [leaves(parse_shape(module.instructions[name].shape)) for name in call.operands]
    inside = [
        one[0].dims[1] for one in shapes if one and len(one[0].dims) == 2 and one[0].dims[0] == out.dims[0]
    ]
    return 2.0 * rows * inside[0] * out.dims[1] if inside and len(out.dims) == 2 else 0.0


def grouped_kernel(instruction: Instruction) -> str | None:
    """Return the name of the kernel of grouped rows that an instruction calls, None for others."""
    if instruction.opcode != "custom-call" or _ROWS.search(instruction.op_name) is None:
        return None
    return "megablox" if _MEGABLOX.search(instruction.op_name) else "mosaic"


def _of_even_rows(module: HloModule, call: Instruction, stated: float) -> float:
    """Return the bytes that a kernel of grouped rows moves for an even router, of those for all its room.

    All are of rows, or of matrices once for each tile of rows, but the gradient of the matrices itself.
    """
    rows = _ROWS.search(call.op_name)
    shapes = [leaves(parse_shape(module.instructions[name].shape)) for name in call.operands]
    room = max((one[0].dims[0] for one in shapes if one and len(one[0].dims) == 2), default=0)
    if rows is None or not room:
        return stated
    whole = _bytes(call) if len(leaves(parse_shape(call.shape))[0].dims) == 3 else 0.0
    return whole + (stated - whole) * min(1.0, int(rows[1]) / room)


def _convolution(module: HloModule, convolution: Instruction) -> float:
    labels = _LABELS.search(convolution.attributes)
    if labels is None or len(convolution.operands) < 2:
        return 0.0
    left, right = (_array(module, operand) for operand in convolution.operands[:2])
    out = leaves(parse_shape(convolution.shape))[0]
    lhs, rhs, result = labels[1], labels[2], labels[3]
    group = {key: int(count) for key, count in _GROUPS.findall(convolution.attributes)}
    total = 2.0 * out.dims[result.index("b")] * out.dims[result.index("f")] * right.dims[rhs.index("i")]
    total /= group.get("batch_group_count", 1)
    spatial = sorted(label for label in lhs if label.isdigit())
    window = _window(convolution.attributes, len(spatial)) if spatial else {}
    for place, label in enumerate(spatial):
        if label not in rhs or label not in result:
            continue
        row = {key: values[place] for key, values in window.items()}
        total *= _window_pairs(
            left.dims[lhs.index(label)], out.dims[result.index(label)], right.dims[rhs.index(label)], **row
        )
    return total


def _window(attributes: str, rank: int) -> dict[str, list[int]]:
    written = _WINDOW.search(attributes)
    fields = dict(part.split("=", 1) for part in written[1].split() if "=" in part) if written else {}
    pads = [pair.split("_")[0] for pair in fields["pad"].split("x")] if "pad" in fields else ["0"] * rank
    read = {
        "stride": [int(v) for v in fields["stride"].split("x")] if "stride" in fields else [1] * rank,
        "pad": [int(v) for v in pads],
        "holes": [int(v) for v in fields["lhs_dilate"].split("x")] if "lhs_dilate" in fields else [1] * rank,
        "spread": [int(v) for v in fields["rhs_dilate"].split("x")] if "rhs_dilate" in fields else [1] * rank,
    }
    return {key: values + [values[-1]] * (rank - len(values)) for key, values in read.items()}


@lru_cache(maxsize=4096)
def _window_pairs(
    size: int, out: int, window: int, *, stride: int, pad: int, holes: int, spread: int
) -> float:
    """Return how many pairs of an output element and a window element fall on one of `size` inputs.

    Along one dimension: `holes` is the dilation of the inputs, `spread` that of the window.
    """
    reach = (size - 1) * holes  # position of the last input after dilation
    found = 0
    for k in range(window):
        offset = k * spread - pad
        first = max(0, math.ceil(-offset / stride))
        last = min(out - 1, (reach - offset) // stride)
        if last < first:
            continue
        if holes == 1:
            found += last - first + 1
        else:
            found += sum((o * stride + offset) % holes == 0 for o in range(first, last + 1))
    return float(found)


def _fusion_bytes(module: HloModule, fusion: Instruction) -> float:
    computation = module.computations[fusion.calls or ""]
    parameters, users = _inside(module, fusion)
    total = _written(module, computation.root)
    return total + sum(_read(parameter.name, _bytes(parameter), users) for parameter in parameters.values())


def fusion_slices(module: HloModule, fusion: Instruction, operand: str) -> float:
    """Return the bytes that a fusion's slices take of an operand; all of it if another opcode reads it.

    A gather of rows counts as reading the whole operand.
    """
    if fusion.calls not in module.computations:
        return _bytes(module.instructions.get(operand))
    parameters, users = _inside(module, fusion)
    return sum(
        _read(parameters[place].name, _bytes(parameters[place]), users, parts=_SLICES)
        for place, name in enumerate(fusion.operands)
        if name == operand and place in parameters
    )


def _inside(
    module: HloModule, fusion: Instruction
) -> tuple[dict[int, Instruction], dict[str, list[Instruction]]]:
    """Return a fusion's parameters by number, and the instructions inside that read each name."""
    users: dict[str, list[Instruction]] = {}
    parameters: dict[int, Instruction] = {}
    for name in module.computations[fusion.calls or ""].instructions:
        inner = module.instructions[name]
        if inner.opcode == "parameter":
            parameters[int(inner.literal or 0)] = inner
        for operand in inner.operands:
            users.setdefault(operand, []).append(inner)
    return parameters, users


def _read(
    name: str,
    whole: float,
    users: Mapping[str, list[Instruction]],
    depth: int = 8,
    parts: frozenset[str] = _PARTS,
) -> float:
    taken = 0.0
    for user in users.get(name, []):
        if user.opcode in parts and user.operands[0] == name:
            taken += _bytes(user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place, not read
        elif user.opcode in _THROUGH and depth and user.name in users:
            taken += _read(user.name, whole, users, depth - 1, parts)
        else:
            return whole
    return min(taken, whole)


def _written(module: HloModule, root: str) -> float:
    instruction = module.instructions[root]
    if instruction.opcode == "tuple":
        return sum(_written(module, operand) for operand in instruction.operands)
    if instruction.opcode in _THROUGH and instruction.operands:
        inner = module.instructions[instruction.operands[0]]
        if inner.opcode == "dynamic-update-slice":
            return _written(module, inner.name)
    if instruction.opcode == "dynamic-update-slice" and len(instruction.operands) > 1:
        return _bytes(module.instructions[instruction.operands[1]])
    return _bytes(instruction)
