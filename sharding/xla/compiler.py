"""What the compiler of a topology does that a plan has to count on: the facts of `quirks.toml`."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from pathlib import Path
from typing import Any

from ..hardware.chip import Chip
from ..hardware.topology import Topology

_QUIRKS = Path(__file__).with_name("quirks.toml")
_BY_PLATFORM = {"tpu": "libtpu", "gpu": "xla:gpu", "cpu": "xla:cpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiler:
    """One of XLA's compilers, for one chip.

    Attributes:
      name: ``libtpu``, ``xla:gpu`` or ``xla:cpu``.
      reduces_whole: a gradient that is a partial sum over several mesh axes is reduced over all of them in
        each microbatch, not scattered over those that it is stored over.
      gathers_wait: share of the seconds in which parameters are gathered that nothing is scheduled beside,
        unless options say so.
      scatters_wait: share of the seconds in which a layer scatters its gradients that nothing is scheduled
        beside: they go as one collective at its end.
      sums_wait: the same of gradients that are reduced whole over several axes, each by itself.
      gathers_copy: what is gathered is not written into an array that the step gives up, but copied there,
        and the array itself is copied before it is read.
      last_layer_apart: where values come back from the host, the last layer runs outside of the loop over
        layers, beside what follows it.
      host_is_device: what lies on the host counts as the device's own memory.
      schedules_within: share of a device's memory, without what a step is given, that its scheduler works
        within, whatever JAX reserves: beyond it what could be kept is run again.
      scatters_planes: a reduce-scatter over two torus axes of equal size is one, over three it is an
        all-reduce and a slice.
      tile_rows: rows of a tile of two-byte elements; gathers and scatters move arrays that are cut into
        whole tiles as they lie, others they pad or transpose.
      reduces_cast: a sum that is cast to a smaller type is reduced over devices in that type.
      gradient_beside: the gradient of logits lies beside them, in the type that products take.
      makes_ahead: what a loop makes of nothing that changes (numbers of a vocabulary), which JAX puts ahead
        of it, lies in memory through the loop; others make it again in each turn.
      zeros_together: zeros of one shape that gradients are added to are made by one kernel, at the first of
        them: of a table that both a look-up and the loss use two lie in memory from the loss on.
      untuned_peak: the peak that it states without a device is of products that nobody tuned. Tuned ones are
        other kernels, and what is elementwise after them may not be written in their place: the larger of it
        and of a replay in which nothing is holds.
      aligned_elements: elements of two bytes that matrix units read at once: products with a row, column or
        contraction that is no multiple of them are slower.
      product_bytes: of an element as products take it where no precision is asked for, None for its own: what
        they take and a loop does not change is cast before the loop.
      takes_out: what a loop works with of an array that it carries is taken out of it, and what is added to
        it is a copy; others work with it where it lies.
      rings: fewest devices of an axis over which products are taken apart that take what is gathered over it,
        or whose result is summed and cut over it: parts go round the axis, both ways, while others are
        multiplied. 0 where they never are.
      fuses_products: what is elementwise before a product is made within it, and it adds to what another
        product gave: neither is an array of its own.
      shows_schedule: what it scheduled can be read before it makes machine code of it (`verify.scheduled`).
      host_rate: bytes a second at which its scheduler takes values to travel to the host and back: beside a
        transfer it places as much work as one takes at that rate, and a slower link is waited for. None where
        it counts on the link's own.
      one_ring: what is gathered or scattered over a part of one torus axis and others beside it goes round
        all of them as one ring, by two of a chip's links; over whole axes each is a ring.
      keeps_gathered: keys and values that a kernel reads whole, gathered over `context`, are kept for the
        gradient as they are gathered, where they are kept as the kernel reads them.
      passes_whole: it ends itself on the passes of a pipeline's chunk where they are cut in two, beside an
        axis that it works with by itself.
    """

    name: str
    reduces_whole: bool = False
    gathers_wait: float = 0.0
    scatters_wait: float = 0.0
    sums_wait: float = 0.0
    gathers_copy: bool = False
    last_layer_apart: bool = False
    host_is_device: bool = False
    schedules_within: float = 1.0
    scatters_planes: bool = False
    tile_rows: int = 1
    reduces_cast: bool = False
    gradient_beside: bool = False
    makes_ahead: bool = False
    zeros_together: bool = False
    untuned_peak: bool = False
    aligned_elements: int = 1
    product_bytes: int | None = None
    takes_out: bool = False
    rings: int = 0
    fuses_products: bool = False
    shows_schedule: bool = False
    host_rate: float | None = None
    one_ring: bool = False
    keeps_gathered: bool = False
    passes_whole: bool = False


@functools.cache
def quirks() -> dict[str, list[dict[str, Any]]]:
    """Return fact → its rows of `quirks.toml`."""
    return tomllib.loads(_QUIRKS.read_text(encoding="utf-8"))


@functools.cache
def _compiler(name: str, chip: str) -> Compiler:
    facts = {
        fact: row["value"]
        for fact, rows in quirks().items()
        for row in rows
        if row["compiler"] == name and chip in row.get("chips", (chip,))
    }
    return Compiler(name=name, **facts)


def compiler_of(topology: Topology) -> Compiler:
    """Return what compiles for `topology`, whether it is installed here or not.

    >>> compiler_of(Topology.parse("v5e:4x4")).name, compiler_of(Topology.parse("h100:8")).aligned_elements
    ('libtpu', 8)
    """
    return compiler_for(topology.chip)


def compiler_for(chip: Chip) -> Compiler:
    """Return what compiles for `chip`; see `compiler_of`."""
    return _compiler(_BY_PLATFORM[chip.platform], chip.name)
