"""From a candidate, in the numbers of one traced program, to a Plan, in names and paths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..cost.candidate import Candidate, Storage
from ..hardware.topology import Topology
from ..plans.origin import Alternative, Origin
from ..plans.record import ArrayPlan, DimPlan, Plan, Spec
from ..program.program import Argument, Program
from ..words import storage_of, why_lost
from .choices.storage import computed
from .search import Priced, Stored

# A parameter that is more than this part of all is worth a note if it lies whole on every device.
_MATTERS = 0.01


def plan_of(program: Program, topology: Topology, candidate: Candidate, **remembered: Any) -> Plan:
    """Return the Plan that runs `program` as `candidate` says; `remembered` are further fields of it."""
    return Plan(
        topology=str(topology),
        mesh=dict(candidate.mesh),
        dims=dims_of(program, candidate),
        params=params_of(program, candidate),
        batch=batch_of(program, candidate),
        remat=candidate.remat,
        saved=dict(candidate.saved),
        microbatches=candidate.microbatches,
        schedule=candidate.schedule if candidate.mesh.get("stage", 1) > 1 else None,
        interleave=candidate.interleave,
        moments=moments_of(program, candidate),
        origin=Origin.of(program),
        **remembered,
    )


def dims_of(program: Program, layout: Candidate) -> dict[str, DimPlan]:
    """Return every dimension that stands in an argument, with the axes it is computed over."""
    return {
        dim.name: DimPlan(
            size=dim.size,
            axes=layout.dims.get(dim.id, ()),
            argument=program.arguments[dim.places[0].argument].position,
            path=dim.places[0].path,
            dimension=dim.places[0].dimension,
            part=dim.places[0].part,
        )
        for dim in program.dims
        if dim.places
    }


def params_of(program: Program, layout: Candidate) -> dict[str, ArrayPlan]:
    """Return how every parameter is stored."""
    return {argument.path: _array(argument, layout.stored[argument.index]) for argument in program.parameters}


def moments_of(program: Program, layout: Candidate) -> dict[str, Spec]:
    """Return the specs of gradients and moments that are stored otherwise than their parameters."""
    return {
        argument.path: spec_of(layout.optimizer[argument.index])
        for argument in program.parameters
        if layout.optimizer[argument.index] != layout.stored[argument.index]
    }


def batch_of(program: Program, layout: Candidate) -> dict[str, ArrayPlan]:
    """Return how every array of the batch lies."""
    return {
        argument.path: _array(argument, computed(argument, layout.dims, layout.mesh))
        for argument in program.arguments
        if not argument.is_parameter
    }


def alternatives_of(
    program: Program, best: Priced, others: Sequence[Priced], capacity_bytes: float, stored: Stored | None
) -> tuple[Alternative, ...]:
    """Return the layouts that lost to `best`, with the reasons."""
    return tuple(
        Alternative(
            mesh=dict(other.candidate.mesh),
            sharded={program.dims[dim].name: axes for dim, axes in other.candidate.dims.items()},
            storage=storage_of(program, other.candidate),
            remat=other.candidate.remat,
            saved=dict(other.candidate.saved),
            microbatches=other.candidate.microbatches,
            estimate=other.estimate,
            fits=other.fits,
            lost=why_lost(
                best,
                other,
                capacity_bytes,
                None if stored is None else (stored(best.candidate), stored(other.candidate)),
            ),
        )
        for other in others
    )


def notes_of(program: Program, layout: Candidate) -> tuple[str, ...]:
    """Say which parameters that matter lie whole on every device although others are stored in parts."""
    cut = [argument for argument in program.parameters if any(layout.stored[argument.index])]
    if not cut:
        return ()
    total = sum(_bytes(argument) for argument in program.parameters)
    over = " x ".join(f"{axis}={size}" for axis, size in layout.mesh.items() if size > 1 and axis != "data")
    return tuple(
        f"{argument.path} {argument.shape} lies whole on every device: {over} divides no dimension of it"
        for argument in program.parameters
        if not any(layout.stored[argument.index]) and _bytes(argument) > _MATTERS * total
    )


def spec_of(storage: Storage | Sequence[tuple[str, ...]]) -> Spec:
    """Return axes of each dimension as a PartitionSpec's entries, without trailing Nones."""
    entries: list[Any] = [
        None if not axes else axes[0] if len(axes) == 1 else tuple(axes) for axes in storage
    ]
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def parameter_bytes(program: Program) -> Mapping[int, int]:
    """Return parameter argument index → bytes."""
    return {argument.index: _bytes(argument) for argument in program.parameters}


def _bytes(argument: Argument) -> int:
    return math.prod(argument.shape) * argument.dtype.itemsize


def _array(argument: Argument, storage: Storage | Sequence[tuple[str, ...]]) -> ArrayPlan:
    return ArrayPlan(shape=argument.shape, dtype=str(argument.dtype), spec=spec_of(storage))
