"""A plan's decision on a few simulated devices: each axis that it has, each kind of cut, small arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..hardware.topology import Topology
from ..ops.context.ways import NEIGHBOURS
from . import arrays
from .record import Decision
from .specs import axes_of, cut_into
from .vocabulary import DELAYED

# Simulated devices that a mesh is brought down to; more only where so many axes have to have two each.
DEVICES = 8
# Axes that get what is left, the first before the others: ends and middle differ along the first two.
_GROWING = ("stage", "context", "expert", "fsdp", "tensor", "data")
# A factor of an axis that is larger becomes two.
_MOST_FACTOR = 4
# Microbatches and rows of each that show what more of them would.
_MICROBATCHES, _ROWS = 4, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction:
    """How a plan is brought down to simulated devices.

    Attributes:
        mesh: axis → size.
        microbatches: parts that rows are worked through in.
        interleave: chunks that a stage holds.
        rows: of the batch.
        sequence_parts: what a sequence has to divide by.
        layers: of a stack: whole chunks of stages where the plan's are whole, else one less.
    """

    mesh: Mapping[str, int]
    microbatches: int
    interleave: int
    rows: int
    sequence_parts: int
    layers: int

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    def size(self, whole: int, least: int) -> int:
        """Return a size of about `least` or more in place of `whole`, that divides by what divides `whole`.

        >>> small = Reduction(
        ...     mesh={"fsdp": 8}, microbatches=1, interleave=1, rows=8, sequence_parts=1, layers=2
        ... )
        >>> small.size(4096, 30), small.size(6, 4), small.size(50257, 64), small.size(3, 64)
        (32, 4, 64, 3)
        """
        common = math.gcd(whole, self.devices * self.sequence_parts)
        return min(whole, -(-least // common) * common)


def reduction_of(plan: Decision, layers: int | None = None) -> Reduction:
    """Return how `plan` is brought down; `layers` are those that its stages share, if it has stages."""
    mesh = reduced_mesh(plan.mesh, least={"context": 4} if plan.context == NEIGHBOURS else {})
    stages, chunks = mesh.get("stage", 1), min(plan.interleave, 2)
    # Gradients of weights that are delayed begin when as many microbatches as stages are back.
    most = max(_MICROBATCHES, 2 * stages) if plan.schedule == DELAYED else _MICROBATCHES
    microbatches = min(plan.microbatches, most)
    if plan.microbatches > most:
        # As many as stages divide, or not, as it is in the plan.
        uneven = bool(plan.microbatches % plan.mesh.get("stage", 1))
        microbatches = max(most, stages) + uneven
    cut = math.lcm(*(cut_into(axes, mesh) for axes in _of_rows(plan)))
    whole = max((row.shape[0] for row in plan.batch.values() if row.shape), default=1)
    each = max(
        whole // (plan.microbatches * math.lcm(*(cut_into(one, plan.mesh) for one in _of_rows(plan)))), 1
    )
    slots = stages * chunks
    taken = 2 if slots == 1 else slots * (2 if slots <= _MICROBATCHES else 1)
    if layers is not None and layers % (plan.mesh.get("stage", 1) * plan.interleave):
        taken -= 1
    return Reduction(
        mesh=mesh,
        microbatches=microbatches,
        interleave=chunks,
        rows=cut * microbatches * math.gcd(each, max(stages, _ROWS)),
        sequence_parts=2 * mesh.get("context", 1),
        layers=taken,
    )


def reduced_mesh(mesh: Mapping[str, int], least: Mapping[str, int]) -> dict[str, int]:
    """Return the mesh with every axis that it has at two or so, and eight devices where that can be.

    >>> reduced_mesh({"data": 16, "stage": 8, "fsdp": 1}, {})
    {'data': 2, 'stage': 4, 'fsdp': 1}
    >>> reduced_mesh({"fsdp": 256}, {}), reduced_mesh({"data": 3, "tensor": 5}, {})
    ({'fsdp': 8}, {'data': 3, 'tensor': 2})
    """
    sizes = {axis: 1 if size == 1 else _factor(size) for axis, size in mesh.items()}
    for axis, wanted in least.items():
        if axis in sizes and mesh[axis] >= wanted:
            sizes[axis] = max(sizes[axis], wanted)
    order = [axis for axis in _GROWING if sizes.get(axis, 1) > 1]
    grown = True
    while grown:
        grown = False
        # The smallest first, so that none is left behind.
        for axis in sorted(order, key=lambda axis: sizes[axis]):
            size = sizes[axis] * _factor(max(mesh[axis] // sizes[axis], 1))
            if size > sizes[axis] and math.prod(sizes.values()) // sizes[axis] * size <= DEVICES:
                sizes[axis], grown = size, True
                break
    return sizes


def _factor(size: int) -> int:
    """Return the smallest factor of a size above 1, two for a large one."""
    found = next((n for n in range(2, _MOST_FACTOR + 1) if size % n == 0), 2)
    return found if size > 1 else 1


def _of_rows(plan: Decision) -> list[tuple[str, ...]]:
    """Return the axes that cut the first dimension of each array of the batch."""
    return [axes_of(row.spec[0]) for row in plan.batch.values() if row.spec] or [()]


def reduced(plan: Decision, how: Reduction, params: Any, batch: Any, state: Any = None) -> Decision:
    """Return `plan` on simulated devices, for small arrays; kernels are XLA's own, which compute the same.

    Raises UserError if the arrays are not those of the plan by path, or do not divide by what cuts them.
    """
    return arrays.resized(
        plan,
        params,
        batch,
        state,
        topology=Topology.parse(f"cpu:{how.devices}"),
        mesh=how.mesh,
        microbatches=how.microbatches,
        interleave=how.interleave,
        kernels={},
        compiler_options={},
        calibration=None,
    )
