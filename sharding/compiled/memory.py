"""The memory of a compiled step over its schedule: the fullest moment, what fills it, what padding costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..hlo.frames import nearest_line
from ..hlo.loops import Loop
from ..hlo.text import Program
from ..plans.proof import Buffer
from .buffers import Block, in_hbm, on_host, replay

#: Points of the timeline that a Proof keeps, and buffers: as many as a page can show.
MOST_POINTS, MOST_BUFFERS = 200, 40


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of HBM alive over the schedule, as the replay has them; the compiler's own figure may differ.

    `padding_bytes` is what the tiles of the buffers at the peak hold beyond elements, `host_bytes` the most
    that lies on the host at once.
    """

    peak_bytes: float
    padding_bytes: float
    host_bytes: float
    buffers: tuple[Buffer, ...]
    timeline: tuple[float, ...]
    largest_padding: Buffer | None


def memory(program: Program, loops: Mapping[str, Loop], platform: str) -> Memory:
    """Replay the schedule with every buffer's life.

    Fragmentation and alignment are left out, and loops are entered once. Seen against the compiler's own
    figures: a step of Llama-3-8B for v5p:4x4x8 1.002 of its peak, with offloading 1.000 of it and of the
    host's bytes, for h100:4x8 1.000 of arguments and temporaries (the peak that the CUDA compiler states
    counts what lies on the host too); small steps 0.98 to 1.03. A TPU's stated peak counts vector memory
    where little else is in use, which this does not.
    """
    found = replay(program, dict(loops), platform)
    hbm = [block for block in found.blocks if in_hbm(block.array, platform)]
    host = [block for block in found.blocks if on_host(block.array) and platform != "cpu"]
    alive = _alive(hbm, len(found.places))
    peak = int(np.argmax(alive)) if len(alive) else 0
    there = [block for block in hbm if block.born <= peak <= block.last]
    padding = [block.bytes - block.array.bytes for block in there]
    worst = max(zip(padding, there, strict=True), key=lambda pair: pair[0], default=None)
    there.sort(key=lambda block: -block.bytes)
    return Memory(
        peak_bytes=float(alive[peak]) if len(alive) else 0.0,
        padding_bytes=float(sum(padding)),
        host_bytes=float(_alive(host, len(found.places)).max(initial=0.0)),
        buffers=tuple(_buffer(program, block) for block in there[:MOST_BUFFERS]),
        timeline=_thinned(alive),
        largest_padding=None if worst is None or worst[0] <= 0 else _buffer(program, worst[1]),
    )


def _alive(blocks: list[Block], places: int) -> np.ndarray:
    change = np.zeros(places + 2)
    for block in blocks:
        change[block.born] += block.bytes
        change[block.last + 1] -= block.bytes
    return np.cumsum(change)[: places + 1]


def _buffer(program: Program, block: Block) -> Buffer:
    instruction = program.instructions.get(block.name)
    argument = instruction is not None and instruction.opcode == "parameter"
    named = instruction.op_name.replace("\\'", "'") if instruction is not None and argument else ""
    return Buffer(
        name=named or block.name,
        shape=block.array.text,
        bytes=block.bytes,
        source=None if argument else nearest_line(program, block.name),
    )


def _thinned(alive: np.ndarray) -> tuple[float, ...]:
    """Return at most `MOST_POINTS` points, each the most of its stretch, so that the peak is among them."""
    if len(alive) <= MOST_POINTS:
        return tuple(float(value) for value in alive)
    return tuple(float(part.max()) for part in np.array_split(alive, MOST_POINTS))
