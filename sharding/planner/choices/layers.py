"""The dimension of a program's layers, and where stages cut it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ...cost.candidate import Storage
from ...cost.stacks import is_moved
from ...errors import UserError, check_word
from ...paths import folders_of
from ...plans.specs import cut_into
from ...plans.vocabulary import SCHEDULES
from ...program.layers import cuts_beside, layer_scans
from ...program.program import Argument, Program

STAGE = "stage"
# Axes that XLA works with by itself, beside which no other cuts the same dimension.
AUTOMATIC = ("tensor", "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """The dimension of layers that parameters are stacked in; by the program if `written_out`.

    `members` are the parameters that the program stacks, by argument index.
    """

    dim: int
    name: str
    count: int
    written_out: bool = False
    members: frozenset[int] = frozenset()


def layers_of(program: Program) -> Layers | None:
    """Return the layers that hold most parameters, None for a program without a scan over stacked ones."""
    sizes = _sizes(program)
    return _layers(program, max(sizes, key=lambda dim: (sizes[dim], -dim))) if sizes else None


def stacks_over_stages(program: Program, stages: int, chunks: int) -> tuple[Layers, ...]:
    """Return the layers that stages of so many chunks cut: `layers_of` and those beside them, as they run."""
    most = layers_of(program)
    return tuple(one for one in _stacks(program) if one == most or cuts_beside(one.count, stages, chunks))


def stacks_beside_stages(program: Program, stages: int, chunks: int) -> tuple[Layers, ...]:
    """Return the layers with parameters that such stages do not cut, since they are too few."""
    cut = stacks_over_stages(program, stages, chunks)
    return tuple(one for one in _stacks(program) if one not in cut)


def names_of_stacks(program: Program, stacks: Sequence[Layers]) -> list[str]:
    """Return a name for each of some stacks of layers: the folder of their parameters."""
    found = (sorted(stacked(program, one)) for one in stacks)
    return folders_of([program.arguments[index].path for index in own] for own in found)


def why_no_chunks(program: Program, stages: int, chunks: int) -> str | None:
    """Return why stages do not hold so many chunks of each stack of layers that they cut; None if they do.

    Of one stack alone the chunks that are too many are copies, which are passed by.
    """
    cut = stacks_over_stages(program, stages, 1)
    least = min(cut, key=lambda one: one.count, default=None)
    if least is None or len(cut) == 1 or least.count >= stages * chunks:
        return None
    near, name = max(least.count // stages, 1), names_of_stacks(program, [least])[0]
    return (
        f"interleave={chunks} x stage={stages} = {stages * chunks} chunks are more than the {least.count} "
        f"layers of {name}; nearest: interleave={near}"
    )


def _stacks(program: Program) -> tuple[Layers, ...]:
    """Return the layers that have parameters of their own, as they run."""
    most, sizes = layers_of(program), _sizes(program)
    scans = [one.factors[0].dims[:1] for one in layer_scans(program.scope) if one.factors]
    order = dict.fromkeys(dim for dims in scans for dim in dims if dim in sizes)
    if most is None:
        return ()
    found = [_layers(program, dim) for dim in (order if most.dim in order else (most.dim, *order))]
    return tuple(one for one in found if one == most or not stacked(program, one) & stacked(program, most))


def stacked(program: Program, layers: Layers) -> frozenset[int]:
    """Return the parameters that have a dimension of layers, or are stacked by it."""
    have = (a.index for a in program.parameters if any(layers.dim in dims for dims in a.dims))
    return layers.members.union(have)


def _sizes(program: Program) -> dict[int, int]:
    """Return the elements of the parameters of each dimension of layers that has any."""
    sizes = {dim.id: 0 for dim in program.dims if dim.stacked}
    for argument in program.parameters:
        for dim in {dim for composition in argument.dims for dim in composition}.intersection(sizes):
            sizes[dim] += math.prod(argument.shape)
    for stack in program.stacks:
        if stack.dim in sizes:
            sizes[stack.dim] += sum(math.prod(program.arguments[index].shape) for index in stack.arguments)
    return {dim: size for dim, size in sizes.items() if size}


def _layers(program: Program, dim: int) -> Layers:
    most = program.dims[dim]
    members = {index for stack in program.stacks if stack.dim == most.id for index in stack.arguments}
    return Layers(
        dim=most.id,
        name=most.name,
        count=most.size,
        written_out=not most.places,
        members=frozenset(members),
    )


def why_no_stages(program: Program, found: Layers | None, stages: int) -> str | None:
    """Return why a program cannot be cut into so many stages; None if it can."""
    shared = None if found else next(layer_scans(program.scope), None)
    if shared is not None:
        return (
            f"stage={stages} cuts layers, and those at {shared.where} have no parameters of their own: each "
            "stage would hold what all of them share; nearest is no stage"
        )
    if found is None:
        loop = next((one for one in program.scope.equations if one.primitive == "while"), None)
        said = f"stage={stages} cuts layers, in a scan or written out alike, and"
        near = "nearest: jax.lax.scan over stacked parameters"
        if loop is None:
            return f"{said} this program has none; {near}"
        return (
            f"{said} how often the loop at {loop.where} runs is not known; {near}, or jax.lax.fori_loop with "
            "numbers for its bounds"
        )
    if found.count < stages:
        return f"stage={stages} is more than {found.name}={found.count}; nearest: {found.count}"
    return None


def check_chunks(chunks: int | None, mesh: Mapping[str, int]) -> None:
    """Raise UserError for a number of chunks that is none, or that no stage holds."""
    if chunks is None:
        return
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise UserError(f"interleave={chunks!r} must be a whole number of at least 1")
    if chunks > 1 and mesh.get(STAGE, 1) == 1:
        raise UserError(f"interleave={chunks} are chunks of a pipeline stage and the mesh declares none")


def check_schedule(schedule: str | None, mesh: Mapping[str, int]) -> None:
    """Raise UserError for a schedule that is unknown or has no stages to order."""
    if schedule is None:
        return
    check_word("schedule", schedule, SCHEDULES)
    if mesh.get(STAGE, 1) == 1:
        raise UserError(f"schedule={schedule!r} orders pipeline stages and the mesh declares none")


def check_stage_remat(given: object, mesh: Mapping[str, int]) -> None:
    """Raise UserError for what is neither true nor false, or of stages that there are not."""
    if given is None:
        return
    if not isinstance(given, bool):
        raise UserError(f"stage_remat={given!r} must be true or false")
    if mesh.get(STAGE, 1) == 1:
        raise UserError(f"stage_remat={given} is of pipeline stages and the mesh declares none")


def moved_layers(program: Program, mesh: Mapping[str, int], chunks: int) -> tuple[Layers, ...]:
    """Return the layers of which stages store others than they run: they are stored in another dimension."""
    stages = mesh.get(STAGE, 1)
    found = stacks_over_stages(program, stages, chunks) if stages > 1 else ()
    return tuple(one for one in found if one.written_out or is_moved(one.count, stages, chunks))


def over_stages(
    argument: Argument, moved: Sequence[Layers], storage: Sequence[tuple[str, ...]], mesh: Mapping[str, int]
) -> list[tuple[str, ...]]:
    """Return the storage of a parameter, of moved layers over stages too in another dimension than theirs."""
    cut = list(storage)
    stacked = bool(argument.dims) and argument.dims[0][:1] in [(one.dim,) for one in moved]
    member = any(argument.index in one.members for one in moved)
    if not (stacked or member) or any(STAGE in axes for axes in cut):
        return cut
    divided = [
        n
        for n, size in enumerate(argument.shape)
        if n >= stacked
        and size % (cut_into(cut[n], mesh) * mesh[STAGE]) == 0
        and not set(cut[n]).intersection(AUTOMATIC)
    ]
    if divided:
        best = max(divided, key=lambda n: (not cut[n], argument.shape[n], -n))
        cut[best] = (*cut[best], STAGE)
    return cut


def laid_over_stages(
    program: Program,
    mesh: Mapping[str, int],
    chunks: int,
    dims: Mapping[int, tuple[str, ...]],
    stored: Mapping[int, Storage],
) -> tuple[dict[int, tuple[str, ...]], dict[int, Storage]]:
    """Return `dims` while computing, and parameters as they are `stored`, with the layers cut over stages.

    Raises UserError if they cannot be.
    """
    found = layers_of(program)
    if reason := why_no_stages(program, found, mesh[STAGE]) or why_no_chunks(program, mesh[STAGE], chunks):
        raise UserError(reason)
    stacks, moved = stacks_over_stages(program, mesh[STAGE], chunks), moved_layers(program, mesh, chunks)
    lie = {(one.dim,) for one in stacks if one not in moved}
    laid = dict(stored)
    for argument in program.parameters:
        own = over_stages(argument, moved, stored[argument.index], mesh)
        places = [n for n, composition in enumerate(argument.dims) if composition[:1] in lie]
        laid[argument.index] = tuple(
            (STAGE, *axes) if n in places[:1] else axes for n, axes in enumerate(own)
        )
    return {**dims, **{one.dim: (STAGE,) for one in stacks}}, laid
