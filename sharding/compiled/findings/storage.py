"""Findings about memory: arrays kept whole, padding, transfers to the host."""

from __future__ import annotations

import math
import re

from ...hlo.frames import nearest_line
from ...hlo.shapes import Array, leaves, parse_shape
from ...hlo.text import SourceLine
from ...plans.proof import Finding
from ...plans.specs import Spec, axes_in, cut_into
from ..evidence import Evidence
from .communication import MATTERS

#: Padding below this share of the peak is usual, and no step fits or fails because of it.
PADDING = 0.05
#: A parameter below this share of the peak costs less kept whole than gathered.
LARGE = 0.001

#: Sequences shorter than this make no array of their square that matters, and are often a width as well.
LONG = 256

# In the names of what a call of `ops.attention` comes to.
_ATTENTION = "meshwright_attention["
_TILES = re.compile(r"\bsharding=\{devices=\[([\d,]+)\]")


def kept_whole(evidence: Evidence) -> list[Finding]:
    """Return arguments that the program cuts into fewer parts than the plan does."""
    if evidence.planned is None:
        return []
    planned: dict[tuple[int, ...], list[int]] = {}
    for path, array in evidence.planned.params.items():
        spec = evidence.planned.moments.get(path, array.spec)
        factors = [_factor(evidence, array.spec), _factor(evidence, spec)]
        planned.setdefault(array.shape, []).extend(factors)
    found = []
    for name in evidence.module.computations[evidence.module.entry].instructions:
        instruction = evidence.module.instructions[name]
        shape = parse_shape(instruction.shape) if instruction.opcode == "parameter" else ()
        if not isinstance(shape, Array):
            continue
        tiles = _tiles(instruction.attributes, len(shape.dims))
        whole = tuple(size * tile for size, tile in zip(shape.dims, tiles, strict=True))
        # A dimension that the tiles do not divide is padded to a multiple of them.
        wanted = [
            factor
            for dims, factors in planned.items()
            if len(dims) == len(whole)
            and all(n <= padded < n + tile for n, padded, tile in zip(dims, whole, tiles, strict=True))
            for factor in factors
        ]
        has = math.prod(tiles)
        if wanted and min(wanted) > has and shape.padded_bytes > LARGE * evidence.peak_bytes:
            more = shape.padded_bytes * (1 - has / min(wanted))
            found.append(
                Finding(
                    kind="parameter_kept_whole",
                    what=f"{instruction.op_name.replace(chr(92), '') or name} {shape.text} is cut into "
                    f"{has}, and was planned to be cut into {min(wanted)}",
                    remedy="give it its planned sharding where the step takes it (`in_shardings`)",
                    bytes=more,
                )
            )
    return found


def sequence_squared(evidence: Evidence) -> list[Finding]:
    """Return arrays of a whole sequence by a whole sequence: attention's scores, or a mask of them.

    Kernels of attention have neither in memory. Where a sequence is as long as a parameter is wide, only what
    comes of a call of attention is told from an activation.
    """
    plan = evidence.planned
    if plan is None or plan.topology.chip.attention_kernel is None:
        return []
    lengths = {row.shape[1] for row in plan.batch.values() if len(row.shape) > 1 and row.shape[1] >= LONG}
    widths = {size for row in plan.params.values() for size in row.shape}
    cut = plan.mesh.get("context", 1)
    found: dict[SourceLine | None, dict[str, Array]] = {}
    for name, _, _ in evidence.instruction_costs():
        instruction = evidence.module.instructions[name]
        of_attention = _ATTENTION in instruction.op_name
        for array in leaves(parse_shape(instruction.shape)):
            squared = any(
                size in array.dims and sum(array.dims.count(part) for part in {size, size // cut}) > 1
                for size in lengths
                if of_attention or size not in widths
            )
            if squared and array.bytes > LARGE * evidence.peak_bytes:
                found.setdefault(nearest_line(evidence.module, name), {})[name] = array
    return [
        Finding(
            kind="sequence_squared",
            what=f"a whole sequence by a whole sequence in memory, {len(arrays)} times; the largest is "
            f"{max(arrays.values(), key=lambda one: one.bytes).text}",
            remedy="have a kernel carry the attention out (the plan's notes say why none does), or score few "
            "queries at a time (`attention(..., chunk=)`)",
            bytes=max(array.bytes for array in arrays.values()),
            source=line,
        )
        for line, arrays in found.items()
    ]


def padding(evidence: Evidence) -> list[Finding]:
    """Return the padding of tiles at the peak, if it is a large part of the memory."""
    memory = evidence.memory
    if memory.largest_padding is None or memory.padding_bytes < PADDING * memory.peak_bytes:
        return []
    worst = memory.largest_padding
    return [
        Finding(
            kind="padding_waste",
            what=f"{memory.padding_bytes / memory.peak_bytes:.0%} of the memory at the peak is padding of "
            f"tiles, most in {worst.shape} ({worst.name})",
            remedy="make the last dimension of each device's part a multiple of 128 and the one before it of "
            "8 (16 for two-byte types), or shard another dimension",
            bytes=memory.padding_bytes,
            source=worst.source,
        )
    ]


def spilled_to_host(evidence: Evidence) -> list[Finding]:
    """Return transfers to or from the host that the plan does not have, or that the step waits for."""
    moved: dict[SourceLine | None, float] = {}
    for name, bytes_ in evidence.host_transfers():
        line = nearest_line(evidence.module, name)
        moved[line] = moved.get(line, 0.0) + bytes_
    if not moved:
        return []
    waits = evidence.costs[evidence.module.entry].items.get("host", 0.0)
    asked = evidence.planned is None or "host" in evidence.planned.saved.values()
    if asked and waits <= MATTERS * evidence.step_seconds:
        return []
    total = sum(moved.values())
    return [
        Finding(
            kind="host_transfers_exposed" if asked else "spilled_to_host",
            what=f"{bytes_ / 1e9:.2f} GB a step go between the device and its host"
            + ("" if asked else ", which the plan did not ask for"),
            remedy="keep fewer values on the host, or more computing between a value's going and coming back"
            if asked
            else "keep these values on the device or compute them again",
            seconds=waits * bytes_ / total,
            bytes=bytes_,
            source=line,
        )
        for line, bytes_ in moved.items()
    ]


def _factor(evidence: Evidence, spec: Spec) -> int:
    assert evidence.planned is not None
    return cut_into(axes_in(spec), evidence.planned.mesh)


def _tiles(attributes: str, rank: int) -> tuple[int, ...]:
    written = _TILES.search(attributes)
    if written is None:
        return (1,) * rank
    # Numbers beyond the array's dimensions count replicas.
    return tuple(int(tile) for tile in written[1].split(","))[:rank]
