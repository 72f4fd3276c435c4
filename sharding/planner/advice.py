"""What to do when nothing fits: by how much, and what would (a larger slice, a smaller batch, …)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import UserError
from ..hardware.topology import Topology
from ..program.around import mesh_of_caller, under
from ..words import gib, layout_in_words
from .declared import Declared
from .inputs import Answer, Problem, Supposing
from .obstacles import in_the_way
from .supposing import Case, case_of, more_rows

# How many times as many devices, how many slices, and how small a part of the batch are looked at.
_MOST_DEVICES = 64
_MOST_SLICES = 16
_LEAST_BATCH = 64
# Wider types take so many times the bytes of narrower ones, and so many times as many devices need not halve
# a layout's share exactly: slices that would have to are passed over.
_WIDE = 2.0
_SPARE = 2.0


def nothing_fits(problem: Problem, topology: Topology, declared: Declared, answer: Answer) -> str:
    """Return the sentence for a problem whose every layout is too large for a device's memory."""
    nearest = answer.found.misfits[0]
    over = nearest.estimate.needed_bytes - answer.capacity_bytes
    one = nearest.candidate
    item, size = max(nearest.estimate.memory.items(), key=lambda row: row[1])
    case = case_of(problem, topology, declared, answer, nearest)
    fixes = [
        fix
        for fix in (
            _less_declared(problem, topology, declared),
            _larger_slice(case),
            _smaller_batch(case),
            _lower_precision(case),
        )
        if fix
    ]
    layout = layout_in_words(one.mesh, one.remat, one.microbatches, one.saved)
    needs = f"{gib(nearest.estimate.needed_bytes)} of a device's {gib(answer.capacity_bytes)}"
    advice = (
        f"what fits: {', or '.join(fixes)}" if fixes else "no larger slice, smaller batch or bfloat16 does"
    )
    way = in_the_way(case)
    left = [note for note in problem.program.notes if " left as " in note]
    return "; ".join(
        part
        for part in (
            f"nothing fits {topology}: the smallest layout ({layout}) needs {needs}, {gib(over)} too much, "
            f"{gib(size)} of it {item}",
            way,
            *left,
            advice,
        )
        if part
    )


def _fits(problem: Problem, topology: Topology, declared: Declared) -> bool:
    """Whether anything fits; nothing does if the problem cannot be laid out so."""
    try:
        return problem.fits(topology, declared)
    except UserError:
        return False


def _less_declared(problem: Problem, topology: Topology, declared: Declared) -> str | None:
    empty = Declared()
    parts = [part for part in ("remat", "microbatches", "mesh", "rules") if getattr(declared, part)]
    for some in dict.fromkeys([*((part,) for part in parts), tuple(parts)]):
        less = dataclasses.replace(declared, **{part: getattr(empty, part) for part in some})
        if some and _fits(problem, topology, less):
            return f"{' and '.join(some)} left to the plan"
    return None


def _larger_slice(case: Case) -> str | None:
    problem, topology, declared = case.problem, case.topology, case.declared
    open_mesh = dataclasses.replace(
        declared, mesh={axis: size for axis, size in declared.mesh.items() if size == -1}
    )
    least = _stored_bytes(problem)
    # All devices together, were what the smallest layout needs cut over more of them.
    least = max(least, case.estimate.needed_bytes * topology.num_devices / _SPARE)
    for larger in larger_slices(topology):
        if least > larger.num_devices * float(larger.chip.hbm_bytes or math.inf):
            continue
        if _fits(problem, larger, declared):
            return str(larger)
        if open_mesh.mesh != declared.mesh and _fits(problem, larger, open_mesh):
            return f"{larger} with another mesh"
    return None


def _stored_bytes(problem: Problem) -> float:
    """Return the bytes of all parameters and moments together, which no layout makes fewer."""
    arrays = problem.optimizer_arrays
    slots = 0.0 if arrays is None else arrays.slot_bytes
    return sum(
        math.prod(argument.shape) * (argument.dtype.itemsize + slots * argument.is_trained)
        for argument in problem.program.stored
    )


def _smaller_batch(case: Case) -> str | None:
    problem = case.problem
    rows = max((leaf.shape[0] for leaf in jax.tree.leaves(problem.batch) if leaf.shape), default=1)
    parts = [2**power for power in range(1, _LEAST_BATCH.bit_length()) if rows % 2**power == 0]
    if not parts or not _may_fit(case, parts[-1]):
        return None
    for part in parts:
        if not _may_fit(case, part):
            continue
        smaller = dataclasses.replace(problem, batch=_with_rows(problem.batch, rows, rows // part))
        try:
            found = _fits(smaller, case.topology, case.declared)
        except (TypeError, ValueError):
            # The loss has the size of the batch written into it.
            return None
        if found:
            return f"a batch of {rows // part} rows instead of {rows}"
    return None


def _may_fit(case: Case, part: int) -> bool:
    """Whether one of `part` parts of the batch fits by this program's own tables, without another trace.

    They take as many microbatches as the whole batch may, so that what does not fit here fits nowhere.
    """
    return not case.table.batch_dims or case.best(Supposing(tables=more_rows(1 / part)))[1]


def _with_rows(batch: Any, old: int, new: int) -> Any:
    def resized(leaf: Any) -> Any:
        shape = (new, *leaf.shape[1:]) if leaf.shape and leaf.shape[0] == old else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(resized, batch)


def _lower_precision(case: Case) -> str | None:
    problem = case.problem
    if case.estimate.needed_bytes > _WIDE * case.capacity_bytes:
        return None
    if not any(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(problem.params)):
        return None
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, jnp.bfloat16 if leaf.dtype == jnp.float32 else leaf.dtype
        ),
        problem.params,
    )
    try:
        if _fits_narrower(case):
            # Whether the loss takes such parameters: what it would need is known.
            with under(mesh_of_caller()):
                jax.eval_shape(problem.loss, params, *problem.args[1:])
            found = True
        else:
            found = _fits(dataclasses.replace(problem, params=params), case.topology, case.declared)
    except (TypeError, ValueError):
        # The loss has the type of its parameters written into it.
        return None
    return "parameters and moments in bfloat16 instead of float32" if found else None


def _fits_narrower(case: Case) -> bool:
    """Whether the candidate itself fits with all that is stored of its float32 parameters in two bytes."""
    sizes = [(math.prod(one.shape), one.dtype) for one in case.problem.program.parameters]
    bytes_ = sum(count * dtype.itemsize for count, dtype in sizes)
    wide = sum(count * dtype.itemsize for count, dtype in sizes if dtype == jnp.float32)
    stored = sum(case.estimate.memory.get(name, 0.0) for name in ("params", "gradients", "optimizer"))
    return case.estimate.needed_bytes - stored * wide / bytes_ / _WIDE <= case.capacity_bytes


def larger_slices(topology: Topology) -> Iterator[Topology]:
    """Yield larger slices of the same chip, the smallest first, then several of the largest."""
    chip = topology.chip
    if not topology.is_torus:
        most = _MOST_DEVICES * topology.num_devices
        hosts = topology.shape[0]
        while (hosts := 2 * hosts) * topology.shape[1] <= most:
            yield dataclasses.replace(topology, shape=(hosts, topology.shape[1]))
        return
    shapes = {tuple(sorted(shape)) for shape in chip.small_slices}
    if chip.cube is not None:
        counts = [chip.cube * 2**power for power in range(5)]
        shapes |= {(a, b, c) for a in counts for b in counts for c in counts if a <= b <= c <= 2 * b <= 4 * a}
    most = chip.max_slice_chips or math.inf
    slices = [
        dataclasses.replace(topology, shape=shape, num_slices=1, hosts_per_slice=None)
        for shape in sorted(shapes, key=lambda shape: (math.prod(shape), shape))
        if math.prod(shape) <= most
    ]
    count = 2
    while slices and count <= _MOST_SLICES:
        slices.append(dataclasses.replace(slices[-1], num_slices=count))
        count *= 2
    yield from (larger for larger in slices if larger.num_devices > topology.num_devices)
