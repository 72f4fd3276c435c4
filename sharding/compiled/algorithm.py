"""The algorithm that a compiler names for a collective, and how many links it uses at once.

libtpu writes ``collective_algorithm_config`` with an emitter, a strategy and a debug text:

- ``StrategyND{colors:3 … dim_used:{0 1 2},{1 2 0},{2 0 1}}``: the data is cut into as many parts as there are
  colors; each part goes along the torus axes in another order, so that as many axes are busy at every moment,
  in both directions (the emitters' name for it is a pincer).
- ``StrategyRing{colors:1 …}``: one ring, both directions.
- ``UniDirectionNDRingStrategy{colors:4 …}``, ``UniDirection1DRingStrategy{colors:2}``: a part a direction.
- ``color_strategies`` of an offload to the SparseCores (tpu7x): a list of colors, each with its rings in one
  direction or both.
- ``1DAllGather…`` with ``group_size``: one ring through all members, over however many axes they lie, both
  directions.

Seen in libtpu 0.0.42 and 0.0.50; what the parts mean is read from their numbers, which agree with the axes
that the groups span in every program of the tests. No public document describes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..hlo.text import Instruction

_EMITTER = re.compile(r'"collective_algorithm_config":\{"emitter":"(\w+)"(?:,"strategy":"(\w+)")?')
_COLORS = re.compile(r"(?:Strategy\w*|\w+Strategy)\{colors:(\d+)")
_USED = re.compile(r"dim_used:((?:\{[\d ]*\},?)+)")
_RING = re.compile(r'"ring_type":"(\w+)"')
_BACKEND = re.compile(r'"backend":"(\w+)"')
_KERNEL = re.compile(r'"kernel_strategy":"KERNEL_STRATEGY_(\w+)"')


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """How a collective is carried out.

    Attributes:
      name: as the compiler names it: emitter, strategy, colors; ``ring (assumed)`` where it names none.
      drives: directed links that a device sends over at once; None where that is not said.
      axes_order: for each color the torus axes in the order gone through, as ``dim_used`` has them.
    """

    name: str
    drives: int | None = None
    axes_order: tuple[tuple[int, ...], ...] = ()


ASSUMED = Algorithm(name="ring (assumed)")
POINT_TO_POINT = Algorithm(name="point to point", drives=1)
#: Pieces of an all-gather between products: libtpu names no algorithm for them, and its kernel is a ring.
FUSED = Algorithm(name="asynchronous collective fusion, ring (assumed)", drives=2)


def algorithm(instruction: Instruction) -> Algorithm:
    """Return the algorithm that `instruction`'s configuration names."""
    text = instruction.attributes
    rings = [_RING.search(color) for color in text.split('"phase_rings"')[1:]]
    if rings:
        drives = sum(1 if ring is not None and "UNIDIR" in ring[1] else 2 for ring in rings)
        return Algorithm(name=f"SparseCore offload colors:{len(rings)}", drives=drives)
    named = _EMITTER.search(text)
    if named is None:
        return _gpu(text)
    emitter, strategy = named[1], named[2] or ""
    found = _COLORS.search(text)
    colors = int(found[1]) if found else None
    name = emitter
    if strategy:
        name += f"/{strategy}" + (f" colors:{colors}" if colors is not None else "")
    return Algorithm(name=name, drives=_drives(emitter, strategy, colors), axes_order=_order(text))


def _drives(emitter: str, strategy: str, colors: int | None) -> int | None:
    if emitter.startswith("1D") or emitter == "SinglePhaseRingSumEmitter":
        return 2
    if colors is None:
        return None
    return colors if strategy.startswith("UniDirection") else 2 * colors


def _order(text: str) -> tuple[tuple[int, ...], ...]:
    used = _USED.search(text)
    if used is None:
        return ()
    return tuple(tuple(int(d) for d in one.split()) for one in re.findall(r"\{([\d ]*)\}", used[1]))


def _gpu(text: str) -> Algorithm:
    kernel, backend = _KERNEL.search(text), _BACKEND.search(text)
    if kernel is not None and kernel[1] != "DEFAULT":
        return Algorithm(name=kernel[1].lower().replace("_", " "))
    if backend is not None:
        return Algorithm(name="NCCL ring (assumed)" if backend[1] == "DEFAULT" else backend[1])
    return ASSUMED
