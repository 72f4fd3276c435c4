"""Sequences that a loss cuts out of its data or adds to, over an axis that the data's own cannot lie over."""

from __future__ import annotations

from collections.abc import Collection

from ..cost.candidate import Candidate
from ..cost.context import calls_of
from ..ops.context.taken import CONTEXT
from ..program.program import Program

# What the sequence of the data is called in rules.
SEQUENCE = "sequence"


def made_of(program: Program, data: int, count: int) -> tuple[int, ...]:
    """Return the dims that attention sees of the data's dim `data`, itself left out, which `count` divides.

    ``tokens[:, :-1]`` of a row of 4,097 tokens; a class token before 255 patches.
    """
    family = program.dims[data].family
    of_data = {dim for a in program.arguments if a.is_data for composition in a.dims for dim in composition}
    kin = [
        dim.id
        for dim in program.dims
        if dim.family == family and dim.id not in of_data and not dim.labels
        if dim.whole is None and dim.size % count == 0
    ]
    if not kin:
        return ()
    seen = {
        composition[0]
        for one in calls_of(program)
        for composition in (one.dims[0][1], one.dims[1][1])
        if composition
    }
    return tuple(dim for dim in kin if dim in seen)


def left_whole(program: Program, data: int, count: int) -> bool:
    """Whether the data's dim `data` lies whole, since only what attention sees of it is divided."""
    return program.dims[data].size % count != 0 and bool(made_of(program, data, count))


def notes_on(program: Program, layout: Candidate) -> tuple[str, ...]:
    """Say which sequences of the data lie whole over ``context`` though what is made of them does not."""
    count = layout.mesh.get(CONTEXT, 1)
    if count == 1:
        return ()
    over = {dim for dim, axes in layout.dims.items() if CONTEXT in axes}
    return tuple(
        dict.fromkeys(
            f"{argument.path or 'the batch'} {argument.shape} lies whole over context={count}, which does "
            f"not divide {program.dims[dim].size}; the {_sizes(program, made)} that attention sees of it "
            "lies over context"
            for argument in program.arguments
            if argument.is_data
            for composition, name in zip(argument.dims, argument.names, strict=True)
            if name == SEQUENCE and composition and (dim := composition[0]) not in over
            if (made := over.intersection(made_of(program, dim, count)))
        )
    )


def _sizes(program: Program, dims: Collection[int]) -> str:
    return " and ".join(str(size) for size in sorted({program.dims[dim].size for dim in dims}))
