"""Plans of candidates: numbers of one traced program become names, paths and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..cost.candidate import Candidate, Storage
from ..cost.pipeline import lockstep
from ..errors import nearest_divisors
from ..hardware.topology import Topology
from ..plans.arrays import least_that_matters
from ..plans.origin import Alternative, Origin
from ..plans.proof import nearby_lines
from ..plans.record import ArrayPlan, DimPlan, Record
from ..plans.specs import Spec, spec_of
from ..plans.trainable import is_float
from ..program.dims import batch_rows, rows_further_on, rows_in_turns, rows_of_a_parameter
from ..program.program import Argument, Program
from ..words import gib, remat_in_words, seconds
from .choices.layers import STAGE, names_of_stacks, stacked, stacks_beside_stages, stacks_over_stages
from .choices.storage import computed
from .search import Priced, StoredBytes

# A parameter that is more than this part of all is worth a note if it lies whole on every device.
_MATTERS = 0.01


def record_of(
    program: Program,
    topology: Topology,
    candidate: Candidate,
    *,
    notes: Sequence[str] = (),
    refused: Mapping[str, str] | None = None,
    batch: Mapping[str, ArrayPlan] | None = None,
    **remembered: Any,
) -> Record:
    """Return the plan that runs `program` as `candidate` says; `remembered` are further fields of it.

    `batch` says how the data lies where that is not as it is computed with. Lines of code in `notes` and in
    what was `refused` are named as in proofs: plans are committed and read elsewhere.
    """
    return Record(
        topology=topology,
        mesh=dict(candidate.mesh),
        dims=dims_of(program, candidate),
        params=params_of(program, candidate),
        batch=batch_of(program, candidate) if batch is None else batch,
        remat=candidate.remat,
        saved=dict(candidate.saved),
        microbatches=candidate.microbatches,
        schedule=candidate.schedule if candidate.mesh.get("stage", 1) > 1 else None,
        interleave=candidate.interleave,
        stage_remat=candidate.stage_remat,
        context=candidate.context,
        moments=moments_of(program, candidate),
        trainable=trainable_of(program),
        stacks=stacks_of(program, candidate),
        origin=Origin.of(program),
        notes=tuple(map(nearby_lines, notes)),
        refused={sizes: nearby_lines(reason) for sizes, reason in (refused or {}).items()},
        **remembered,
    )


def stacks_of(program: Program, layout: Candidate) -> dict[str, int]:
    """Return the layers of each stack that stages cut, as they run, where there are several."""
    stages = layout.mesh.get(STAGE, 1)
    found = stacks_over_stages(program, stages, layout.interleave) if stages > 1 else ()
    names = names_of_stacks(program, found)
    return dict(zip(names, (one.count for one in found), strict=True)) if len(found) > 1 else {}


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


def trainable_of(program: Program) -> tuple[str, ...] | None:
    """Return the paths of the parameters that are trained, None where all floats are."""
    if all(one.is_trained for one in program.parameters if is_float(one)):
        return None
    return tuple(argument.path for argument in program.parameters if argument.is_trained)


def batch_of(program: Program, layout: Candidate) -> dict[str, ArrayPlan]:
    """Return how every array of the batch lies."""
    return {
        argument.path: _array(argument, computed(argument, layout.dims, layout.mesh))
        for argument in program.arguments
        if argument.is_data
    }


def state_of(program: Program, layout: Candidate) -> dict[str, ArrayPlan]:
    """Return how every array of what changes beside the parameters is stored."""
    return {
        argument.path: _array(argument, layout.stored[argument.index])
        for argument in program.stored
        if argument.is_state
    }


def alternatives_of(
    program: Program,
    best: Priced,
    others: Sequence[Priced],
    capacity_bytes: float,
    stored: StoredBytes | None,
) -> tuple[Alternative, ...]:
    """Return the layouts that lost to `best`, with the reasons."""
    return tuple(
        Alternative(
            mesh=dict(other.candidate.mesh),
            sharded={program.dims[dim].name: axes for dim, axes in other.candidate.dims.items()},
            storage=storage_in_words(program, other.candidate),
            remat=other.candidate.remat,
            saved=dict(other.candidate.saved),
            microbatches=other.candidate.microbatches,
            estimate=other.estimate,
            fits=other.fits,
            schedule=other.candidate.schedule if other.candidate.mesh.get("stage", 1) > 1 else None,
            interleave=other.candidate.interleave,
            stage_remat=other.candidate.stage_remat,
            lost=why_lost(
                best,
                other,
                capacity_bytes,
                None if stored is None else (stored(best.candidate), stored(other.candidate)),
            ),
        )
        for other in others
    )


def notes_on_sharing(layout: Candidate) -> tuple[str, ...]:
    """Say that fewer stages than there are share out the rows of a microbatch, and what all would share."""
    ticks = lockstep(layout)
    if ticks.sharers == ticks.stages:
        return ()
    rows = layout.rows // layout.microbatches
    near = f", or microbatches={nearest_divisors(layout.rows // ticks.stages, layout.microbatches)}"
    near = near if layout.rows % ticks.stages == 0 else ""
    return (
        f"of stage={ticks.stages} {ticks.sharers} share out the {rows} rows that a microbatch has on a "
        "device, before and behind the layers, and the others repeat their work; nearest that all share: "
        f"{math.ceil(rows / ticks.stages) * ticks.stages} rows{near}",
    )


def notes_of(program: Program, topology: Topology, layout: Candidate) -> tuple[str, ...]:
    """Say which parameters that matter lie whole on every device although others are stored in parts.

    So do over stages those of a stack of few layers beside a longer one.
    """
    cut = [argument for argument in program.stored if any(layout.stored[argument.index])]
    if not cut:
        return ()
    total = sum(_bytes(argument) for argument in program.stored)
    axes = {axis: size for axis, size in layout.mesh.items() if size > 1 and axis != "data"}
    over = " x ".join(f"{axis}={size}" for axis, size in axes.items())

    def why(argument: Argument) -> str:
        divided = any(size % parts == 0 for size in argument.shape for parts in axes.values())
        return "no rule cuts it" if divided else f"{over} divides no dimension of it"

    stages = axes.get(STAGE, 1)
    uncut = stacks_beside_stages(program, stages, layout.interleave) if stages > 1 else ()
    by_rows = tuple(
        f"{name}, {one.count} layers, lies whole on each of stage={stages}, which work it through by rows: "
        f"they cut stacks of {2 * stages} layers or more"
        for name, one in zip(names_of_stacks(program, uncut), uncut, strict=True)
    )
    known = frozenset().union(*(stacked(program, one) for one in uncut))
    return by_rows + tuple(
        f"{argument.path or 'the parameter'} {argument.shape} lies whole on every device: {why(argument)}"
        for argument in program.stored
        if not any(layout.stored[argument.index])
        and argument.index not in known
        and _bytes(argument) > min(_MATTERS * total, least_that_matters(topology, total))
    )


def notes_of_rows(program: Program, layout: Candidate) -> tuple[str, ...]:
    """Say why no axis shares rows out, or that arrays of the batch have them at different places."""
    if layout.num_devices == 1 or batch_rows(program) == 1:
        return ()
    if program.batch_dims:
        found = rows_further_on(program, swapped=True)
        return (found,) if found else notes_of_turns(program, layout)
    met = rows_of_a_parameter(program)
    return (
        "no array of the batch leads with rows of its own, so that no axis shares them out"
        + (f": {met}; look those up by numbers that come with the rows" if met else ""),
    )


def notes_of_turns(program: Program, layout: Candidate) -> tuple[str, ...]:
    """Say which loop takes one after another what is read as the rows that devices share out."""
    found = rows_in_turns(program) if layout.num_devices > 1 else None
    return (found,) if found else ()


def notes_of_captured(program: Program, topology: Topology) -> tuple[str, ...]:
    """Say which captured arrays matter: a hundredth of a device's memory, or more than all parameters."""
    parameters = sum(parameter_bytes(program).values())
    least = min(least_that_matters(topology, parameters), parameters)
    return tuple(
        f"the loss captures an array {one.shape} of {one.dtype} ({one.where}), which lies whole on every "
        f"device as a constant of the program, {gib(one.bytes)}; pass it among the parameters, and the "
        "others as trainable=, and it is cut as they are"
        for one in program.captured
        if one.bytes > least
    )


def parameter_bytes(program: Program) -> Mapping[int, int]:
    """Return the index of each argument that is stored → bytes."""
    return {argument.index: _bytes(argument) for argument in program.stored}


def _bytes(argument: Argument) -> int:
    return math.prod(argument.shape) * argument.dtype.itemsize


def _array(argument: Argument, storage: Storage | Sequence[tuple[str, ...]]) -> ArrayPlan:
    return ArrayPlan(shape=argument.shape, dtype=str(argument.dtype), spec=spec_of(storage))


def storage_in_words(program: Program, layout: Candidate) -> str:
    """Say how parameters and moments are stored: replicated, fsdp, zero-1 or fsdp + zero-1."""
    gathered = any(
        tuple(computed(argument, layout.dims, layout.mesh)) != layout.stored[argument.index]
        for argument in program.parameters
    )
    further = any(layout.optimizer[index] != stored for index, stored in layout.stored.items())
    kinds = [kind for kind, found in (("fsdp", gathered), ("zero-1", further)) if found]
    return " + ".join(kinds) or "replicated"


def why_lost(best: Priced, other: Priced, capacity_bytes: float, stored: tuple[float, float] | None) -> str:
    """Say in one sentence why `other` lost to `best`.

    `stored` are the bytes that each stores on a device, given where those decide before time does.
    """
    if not other.fits and not other.bound:
        return misfit(other, capacity_bytes)
    if stored is not None and stored[1] > 1.1 * stored[0]:
        return f"stores {gib(stored[1])} of parameters and moments on a device instead of {gib(stored[0])}"
    ours, theirs = best.estimate, other.estimate
    slower = theirs.step_seconds / ours.step_seconds - 1
    if slower < 1e-4:
        more, least = gib(theirs.peak_bytes), gib(ours.peak_bytes)
        if more == least:
            return f"takes as long, and as much memory, {least}"
        return f"takes as long, and {more} instead of {least}"
    item, more = _largest_gain(ours.time, theirs.time)
    share = f"{slower:.1%}" if slower < 0.1 else f"{slower:.0%}" if slower < 2 else f"{1 + slower:.1f} times"
    least = "at least " if other.bound else ""
    return f"{least}{share} {'as long' if slower >= 2 else 'slower'}: {item} takes {seconds(more)} more"


def misfit(one: Priced, capacity_bytes: float) -> str:
    """Say by how much a layout at its smallest does not fit, and what takes most."""
    item, size = max(one.estimate.memory.items(), key=lambda row: row[1])
    return (
        f"does not fit: {gib(one.estimate.needed_bytes)} of {gib(capacity_bytes)} a device even with "
        f"{remat_in_words(one.candidate.remat, one.candidate.saved)} and "
        f"microbatches={one.candidate.microbatches}; {item} takes {gib(size)}"
    )


def _largest_gain(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[str, float]:
    gains = {item: size - ours.get(item, 0.0) for item, size in theirs.items()}
    return max(gains.items(), key=lambda row: row[1])
