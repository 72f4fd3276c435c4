"""Memory of a compiled step over its schedule: the peak, the arrays alive at it, and their padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..hlo.frames import nearest_line
from ..hlo.loops import WhileLoop
from ..hlo.text import HloModule
from ..plans.proof import Buffer
from .buffers import Allocation, in_hbm, on_host, replay

#: Points of the timeline and buffers that a Proof keeps: as many as a page shows.
MOST_POINTS, MOST_BUFFERS = 200, 40


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of HBM alive over the schedule, by a replay of its buffers; the compiler's own figure may differ.

    Attributes:
      peak_bytes: the most that is alive at once.
      argument_bytes: of the program's arguments, in HBM.
      output_bytes: of what it returns beside its arguments, in HBM.
      padding_bytes: of the buffers at the peak, the part that is padding of tiles.
      host_bytes: the most that is on the host at once.
      scratch_bytes: of the peak, what libraries work in that the compiler lacked (`Allocation.assumed`).
      buffers: the largest at the peak, at most `MOST_BUFFERS`.
      timeline: bytes alive at even distances along the schedule, at most `MOST_POINTS`.
      largest_padding: the buffer at the peak with most padding, None if there is no padding.
    """

    peak_bytes: float
    argument_bytes: float
    output_bytes: float
    padding_bytes: float
    host_bytes: float
    scratch_bytes: float
    buffers: tuple[Buffer, ...]
    timeline: tuple[float, ...]
    largest_padding: Buffer | None


def memory(module: HloModule, loops: Mapping[str, WhileLoop], platform: str) -> Memory:
    """Return the memory of a scheduled module on `platform` (``tpu``, ``gpu``, ``cpu``), by replay.

    Fragmentation and alignment are left out, and a loop's body is gone through once. Over the compiler's own
    figures, a step of Llama-3-8B has for v5p:4x4x8 1.002 of the peak, with offloading 1.000 of the peak and
    of the host's bytes; for h100:4x8 1.000 of arguments and temporaries (the peak that the CUDA compiler
    states includes the host's bytes). Small steps have 0.98 to 1.03. The peak that a TPU's compiler states
    includes vector memory where little else is in use, which this one does not.
    """
    found = replay(module, dict(loops), platform)
    hbm = [one for one in found.allocations if in_hbm(one.array, platform)]
    host = [one for one in found.allocations if on_host(one.array) and platform != "cpu"]
    alive = _alive(hbm, len(found.places))
    peak = int(np.argmax(alive)) if len(alive) else 0
    stated = _alive([one for one in hbm if not one.assumed], len(found.places))
    present = [one for one in hbm if one.first <= peak <= one.last]
    padding = [one.bytes - one.array.bytes for one in present]
    worst = max(zip(padding, present, strict=True), key=lambda pair: pair[0], default=None)
    present.sort(key=lambda one: -one.bytes)
    return Memory(
        peak_bytes=float(alive[peak]) if len(alive) else 0.0,
        argument_bytes=sum(one.bytes for one in hbm if _is_argument(module, one)),
        output_bytes=sum(one.bytes for one in hbm if one.pinned and not _is_argument(module, one)),
        padding_bytes=float(sum(padding)),
        host_bytes=float(_alive(host, len(found.places)).max(initial=0.0)),
        scratch_bytes=float(alive[peak] - stated.max()) if len(alive) else 0.0,
        buffers=tuple(_buffer(module, one) for one in present[:MOST_BUFFERS]),
        timeline=_thinned(alive),
        largest_padding=None if worst is None or worst[0] <= 0 else _buffer(module, worst[1]),
    )


def _alive(allocations: list[Allocation], places: int) -> np.ndarray:
    change = np.zeros(places + 2)
    for one in allocations:
        change[one.first] += one.bytes
        change[one.last + 1] -= one.bytes
    return np.cumsum(change)[: places + 1]


def _buffer(module: HloModule, one: Allocation) -> Buffer:
    instruction, argument = module.instructions.get(one.name), _is_argument(module, one)
    named = instruction.op_name.replace("\\'", "'") if instruction is not None and argument else ""
    return Buffer(
        name=named or one.name,
        shape=one.array.text,
        bytes=one.bytes,
        source=None if argument else nearest_line(module, one.name),
    )


def _is_argument(module: HloModule, one: Allocation) -> bool:
    instruction = module.instructions.get(one.name)
    return instruction is not None and instruction.opcode == "parameter"


def _thinned(alive: np.ndarray) -> tuple[float, ...]:
    """Return at most `MOST_POINTS` points, each the maximum of an interval: the peak is among them."""
    if len(alive) <= MOST_POINTS:
        return tuple(float(value) for value in alive)
    return tuple(float(part.max()) for part in np.array_split(alive, MOST_POINTS))
