"""The dimension of a program's layers, and where stages cut it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ...cost.candidate import Storage
from ...errors import UserError, nearest_divisors
from ...program.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """The dimension of the layers that most parameters are stacked in; by the program if `written_out`."""

    dim: int
    name: str
    count: int
    written_out: bool = False


def layers_of(program: Program) -> Layers | None:
    """Return the layers that hold most parameters, None for a program without a scan over stacked ones."""
    sizes = {dim.id: 0 for dim in program.dims if dim.stacked}
    for argument in program.parameters:
        for dim in {dim for composition in argument.dims for dim in composition}.intersection(sizes):
            sizes[dim] += math.prod(argument.shape)
    for stack in program.stacks:
        if stack.dim in sizes:
            sizes[stack.dim] += sum(math.prod(program.arguments[index].shape) for index in stack.arguments)
    if not any(sizes.values()):
        return None
    most = program.dims[max(sizes, key=lambda dim: (sizes[dim], -dim))]
    return Layers(dim=most.id, name=most.name, count=most.size, written_out=not most.places)


def why_no_stages(found: Layers | None, stages: int) -> str | None:
    """Return why a program cannot be cut into so many stages; None if it can."""
    if found is None:
        return f"stage={stages} cuts the layers of a scan over stacked parameters, and this program has none"
    if found.written_out:
        return f"stage={stages} cuts parameters that are stacked, and these layers' are arrays of their own"
    if found.count % stages:
        near = nearest_divisors(found.count, stages)
        return f"stage={stages} does not divide {found.name}={found.count}; nearest: {near}"
    return None


def laid_over_stages(
    program: Program, stages: int, dims: Mapping[int, tuple[str, ...]], stored: Mapping[int, Storage]
) -> tuple[dict[int, tuple[str, ...]], dict[int, Storage]]:
    """Return `dims` while computing, and parameters as they are `stored`, with the layers cut over stages.

    Raises UserError if they cannot be.
    """
    found = layers_of(program)
    if reason := why_no_stages(found, stages):
        raise UserError(reason)
    assert found is not None
    laid = dict(stored)
    for argument in program.parameters:
        places = [n for n, composition in enumerate(argument.dims) if composition[:1] == (found.dim,)]
        if places:
            laid[argument.index] = tuple(
                ("stage", *axes) if n == places[0] else axes for n, axes in enumerate(stored[argument.index])
            )
    return {**dims, found.dim: ("stage",)}, laid
