"""What the user has decided: the whole of a layout by rules, or parts that a search keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from ..cost.candidate import Candidate
from ..errors import IndivisibleBatch, UserError, check_word, wrong
from ..hardware.axes import resolve_axes
from ..hardware.topology import Topology
from ..ops.context.ways import check_way
from ..paths import by_path, matches
from ..plans.record import ArrayPlan, check_stages_keep
from ..plans.specs import axes_in, by_dimension, cut_into
from ..plans.vocabulary import EXACT, ONE_BY_ONE, check_accumulation
from ..program.dims import batch_rows, rows_further_on, rows_of_a_parameter
from ..program.mixtures import experts_dims
from ..program.program import Argument, Dim, Program
from ..rules.application import is_pattern, mentioned
from ..rules.rules import Rules
from ..transform.accumulation.proof import MAX_PASSES
from .choices import arithmetic
from .choices.experts import AUTO, WORDS
from .choices.layers import check_chunks, check_schedule, check_stage_remat, laid_over_stages
from .choices.microbatches import indivisible
from .choices.remat import read
from .sequences import SEQUENCE, left_whole, made_of

# What the first two dimensions of an array of the data are called in rules.
DATA_NAMES = ("batch", SEQUENCE)

# Axes that shard one thing only, so that giving one a size says what it is for.
_EXPERT = "expert"
_PURPOSE = {"context": "sequence", _EXPERT: "experts"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """The parts of a plan that are not to be searched for; None where the search decides."""

    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remat: str | Mapping[str, str] | None = None
    microbatches: int | None = None
    schedule: str | None = None
    interleave: int | None = None
    stage_remat: bool | None = None
    attention: str | Sequence[str] | None = None
    segments: int | None = None
    context: str | None = None
    experts: str = AUTO
    arithmetic: str = arithmetic.AUTO
    accumulation: str = EXACT
    max_passes: int = MAX_PASSES

    def __post_init__(self) -> None:
        self._check_kinds()
        check_accumulation(self.accumulation)
        check_way(self.context)
        check_word("experts", self.experts, WORDS)
        check_word("arithmetic", self.arithmetic, arithmetic.CHOICES)
        if isinstance(self.max_passes, bool) or not isinstance(self.max_passes, int) or self.max_passes < 1:
            raise UserError(f"max_passes={self.max_passes!r} must be a whole number of at least 1")
        check_schedule(self.schedule, self.mesh)
        check_chunks(self.interleave, self.mesh)
        check_stage_remat(self.stage_remat, self.mesh)
        if isinstance(self.remat, str):
            check_stages_keep(self.stage_remat is not False, self.remat)
        if self.segments is not None and (type(self.segments) is not int or self.segments < 1):
            raise UserError(f"segments={self.segments!r} must be a whole number of at least 1")

    def _check_kinds(self) -> None:
        for name, such_as in (("mesh", '{"data": 8}'), ("rules", '{"mlp": "tensor"}')):
            if not isinstance(getattr(self, name), Mapping):
                raise wrong(name, getattr(self, name), f"is no mapping, such as {such_as}")
        for axis, size in self.mesh.items():
            if isinstance(size, bool) or not isinstance(size, int | np.integer):
                raise UserError(f"the mesh's {axis!r} is {size!r}: no whole number, nor -1 for what is left")
        parts = self.microbatches
        if parts is not None and (isinstance(parts, bool) or not isinstance(parts, int | np.integer)):
            raise UserError(f"microbatches={parts!r} must be a whole number of at least 1")
        # Numbers of NumPy's are Python's from here on, as they are in a file.
        object.__setattr__(self, "mesh", {axis: int(size) for axis, size in self.mesh.items()})
        object.__setattr__(self, "microbatches", parts if parts is None else int(parts))
        kernels = self.attention
        named = isinstance(kernels, Sequence) and not isinstance(kernels, bytes) and len(kernels) > 0
        if kernels is not None and not named:
            raise wrong("attention", kernels, "must be the name of a kernel, or several, such as 'auto'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """Declared rules on one mesh.

    `batch` are the axes that the batch is to be over, None if that is open; `dims` maps dim → axes while
    computing, `arrays` maps parameter argument index → array dimension → axes in storage.
    """

    batch: tuple[str, ...] | None = None
    dims: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    arrays: Mapping[int, Mapping[int, tuple[str, ...]]] = dataclasses.field(default_factory=dict)


def keep(
    program: Program,
    declared: Declared,
    mesh: Mapping[str, int],
    params: Any,
    names: Any,
    found: Collection[str] = (),
) -> Kept:
    """Return what `declared` fixes on `mesh`; dimensions of `found` labels are known without their names.

    Raises UserError if a rule cannot hold on it.
    """
    named = {name for argument in program.arguments for name in argument.names}
    purposes = _purposes(declared, mesh)
    rules = {label: axis for label, axis in purposes.items() if label in named or label not in found}
    rules |= declared.rules
    if not rules:
        return Kept()
    checked = Rules(rules)
    by_label = {key: axes for key, axes in checked.declared.items() if not is_pattern(key)}
    batch = by_label.get("batch")
    return Kept(
        batch=None if batch is None else _long(batch, mesh),
        dims=_kept_dims(program, by_label, mesh, set(batch if batch is not None else ("data", "fsdp"))),
        arrays=_kept_arrays(program, rules, mesh, params, names),
    )


def _purposes(declared: Declared, mesh: Mapping[str, int]) -> dict[str, str]:
    return {
        label: axis for axis, label in _PURPOSE.items() if mesh.get(axis, 1) > 1 and axis in declared.mesh
    }


def _long(axes: tuple[str, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if mesh.get(axis, 1) > 1)


def _kept_dims(
    program: Program, by_label: Mapping[str, tuple[str, ...]], mesh: Mapping[str, int], of_batch: set[str]
) -> dict[int, tuple[str, ...]]:
    """Return how ruled dims are computed with: an axis that shards the batch shards nothing else by then."""
    found: dict[int, tuple[str, ...]] = {}
    said: dict[int, str] = {}
    experts = experts_dims(program)
    for argument in program.arguments:
        for name, composition in zip(argument.names, argument.dims, strict=True):
            if name is None or name not in by_label or name == "batch" or not composition:
                continue
            dim = composition[0]
            axes = _but(of_batch, _long(by_label[name], mesh), dim in experts)
            if name == SEQUENCE and argument.is_data and axes:
                count = cut_into(axes, mesh)
                found.update(dict.fromkeys(made_of(program, dim, count), axes))
                if left_whole(program, dim, count):
                    continue
            if found.setdefault(dim, axes) != axes:
                raise UserError(
                    f"rules {said[dim]} and {name} differ, but both are dimension "
                    f"{program.dims[dim].name!r} of this program, which is sharded alike everywhere"
                )
            said.setdefault(dim, name)
    return found


def _kept_arrays(
    program: Program, rules: Mapping[str, Any], mesh: Mapping[str, int], params: Any, names: Any
) -> dict[int, dict[int, tuple[str, ...]]]:
    of_params = {key: rule for key, rule in rules.items() if key not in DATA_NAMES}
    if not of_params:
        return {}
    specs = Rules(of_params).specs(params, mesh, names)
    patterns = [key for key in of_params if is_pattern(key)]
    found: dict[int, dict[int, tuple[str, ...]]] = {}
    flat = _flat_specs(specs)
    for argument, path, spec in zip(program.parameters, by_path(params), flat, strict=True):
        whole = any(matches(pattern, path) for pattern in patterns)
        kept = {
            n: _long(axes, mesh)
            for n, axes in enumerate(by_dimension(spec, len(argument.shape)))
            if whole or argument.names[n] in of_params
        }
        if kept:
            found[argument.index] = kept
    return found


def _flat_specs(specs: Any) -> list[Any]:
    return jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ruled:
    """The one layout that rules make of a program: what yielded is in `notes`, `batch` says how data lies."""

    candidate: Candidate
    batch: Mapping[str, ArrayPlan]
    notes: tuple[str, ...]


def ruled(program: Program, topology: Topology, declared: Declared, *, params: Any, names: Any) -> Ruled:
    """Return the layout of `program` by the declared mesh and rules, over the default rules.

    What is not declared is as plain as can be: moments lie as their parameters, layers keep what JAX keeps,
    the batch is taken whole. Raises UserError if a rule cannot hold or the batch does not divide.
    """
    sizes = resolve_axes(declared.mesh, topology.num_devices)
    rules = _with_exchange(Rules(declared.rules).with_defaults(), program, sizes)
    count = 1 if declared.microbatches is None else declared.microbatches
    repeated = _check_batch(program, rules, sizes, count)
    # A rule for a dimension of the data holds for no parameter, and so would count as matching nothing.
    of_params = Rules(
        {key: rule for key, rule in declared.rules.items() if key not in DATA_NAMES}, defaults=rules.defaults
    )
    if names is None and any(any(argument.names) for argument in program.parameters):
        # Names that the parameters carry themselves.
        names = jax.tree.structure(params).unflatten([argument.names for argument in program.parameters])
    flat = _flat_specs(of_params.specs(params, sizes, names))
    stored = {
        argument.index: by_dimension(spec, len(argument.shape))
        for argument, spec in zip(program.parameters, flat, strict=True)
    }
    policy = read("none" if declared.remat is None else declared.remat)
    dims, regrouped = _ruled_dims(program, rules, sizes)
    said = {axis for rule in rules.declared.values() for axis in mentioned(rule)}
    if sizes.get("stage", 1) > 1 and "stage" not in said:
        dims, stored = laid_over_stages(program, sizes, declared.interleave or 1, dims, stored)
    candidate = Candidate(
        mesh=sizes,
        dims=dims,
        stored=stored,
        optimizer=stored,
        gradients=stored,
        remat=policy.remat,
        saved=policy.saved,
        microbatches=count,
        schedule=declared.schedule or ONE_BY_ONE,
        interleave=declared.interleave or 1,
        stage_remat=declared.stage_remat is not False,
        rows=_rows_of_device(program, rules, sizes) if sizes.get("stage", 1) > 1 else 0,
    )
    rows = {
        argument.path: ArrayPlan(
            shape=argument.shape,
            dtype=str(argument.dtype),
            spec=tuple(rules.spec(_divided(program, argument, rules, sizes), argument.shape, sizes)),
        )
        for argument in program.arguments
        if argument.is_data
    }
    return Ruled(
        candidate=candidate, batch=rows, notes=(*of_params.notes(params, sizes, names), *regrouped, *repeated)
    )


def _divided(
    program: Program, argument: Argument, rules: Rules, sizes: Mapping[str, int]
) -> tuple[str | None, ...]:
    """Return the names of an array's dimensions, without those of sequences that lie whole."""
    count = cut_into(_asked(rules, SEQUENCE, sizes), sizes)
    return tuple(
        None if name == SEQUENCE and dim and left_whole(program, dim[0], count) else name
        for name, dim in zip(argument.names, argument.dims, strict=True)
    )


def _with_exchange(rules: Rules, program: Program, sizes: Mapping[str, int]) -> Rules:
    """Return default rules by which each device of an axis of experts brings tokens of its own.

    Where that axis is for calls of `ops.experts`, as the search has it: its devices would repeat one
    another's work on all else. Rules for the batch or for the experts stay as they are declared.
    """
    said = {"batch", _PURPOSE[_EXPERT]} & rules.declared.keys()
    labels = {_label_of_experts(program.dims[dim], rules) for dim in experts_dims(program)}
    if sizes.get(_EXPERT, 1) == 1 or said or _PURPOSE[_EXPERT] not in labels:
        return rules
    batch = *rules.defaults["batch"], _EXPERT
    return dataclasses.replace(rules, defaults={**rules.defaults, "batch": batch})


def _ruled_dims(
    program: Program, rules: Rules, sizes: Mapping[str, int]
) -> tuple[dict[int, tuple[str, ...]], list[str]]:
    """Say how each dim is sharded while computing, and of which rows XLA decides it.

    An axis that shards the batch holds different rows on each of its devices, so that no other dimension
    can be spread over it while computing: parameters that are stored over it are gathered first. Over
    ``expert`` tokens go to the experts of `ops.experts`, and nothing is gathered.
    """
    of_batch = _asked(rules, "batch", sizes)
    regrouped = {
        dim for a in program.arguments if a.is_data and a.dims for dim in a.dims[0] if len(a.dims[0]) > 1
    }
    planned, notes, experts = {}, [], experts_dims(program)
    for dim in program.dims:
        label = _label_of_experts(dim, rules) if dim.id in experts else _ruled_label(dim, rules)
        if not dim.places or label is None or dim.whole is not None:
            continue
        if dim.id in regrouped and label == "batch" and dim.size % cut_into(of_batch, sizes):
            written = " x ".join(f"{axis}={sizes[axis]}" for axis in of_batch)
            notes.append(
                f"the loss takes its rows in {dim.size} groups, which {written} does not divide: the rows "
                "lie over it, and XLA lays out what is computed of the groups"
            )
            continue
        if all(place.part for place in dim.places):
            # The minor part of a dimension, which its major one stands for: a sequence taken in chunks.
            said = _asked(rules, label, sizes)
            if dim.size % cut_into(said, sizes):
                continue
        if label == SEQUENCE:
            said = _but(of_batch, _long(_asked(rules, label, sizes), sizes), of_experts=False)
            count = cut_into(said, sizes)
            planned.update(dict.fromkeys(made_of(program, dim.id, count), said) if said else {})
            if left_whole(program, dim.id, count):
                continue
        axes = _long(_divided_by(program, dim, label, rules, sizes), sizes)
        if label != "batch":
            axes = _but(of_batch, axes, dim.id in experts)
        if axes:
            planned[dim.id] = axes
    return planned, notes


def _divided_by(
    program: Program, dim: Dim, label: str, rules: Rules, sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """Return the axes that rules give a dim; the UserError where they do not divide it names its array."""
    try:
        return axes_in(rules.spec((label,), (dim.size,), sizes))
    except UserError as error:
        arrays = (program.arguments[place.argument] for place in dim.places)
        array = next((one for one in arrays if one.is_data), None)
        if array is None or label != SEQUENCE:
            raise
        raise UserError(f"{array.path or 'the batch'} {array.shape}: {error}") from None


def _asked(rules: Rules, label: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the axes that rules give a dimension of a label, whatever its size."""
    return axes_in(rules.spec((label,), (cut_into(sizes, sizes),), sizes))


def _but(of_batch: Collection[str], axes: tuple[str, ...], of_experts: bool) -> tuple[str, ...]:
    """Return the axes that a dim other than rows is computed over where those of the rows are `of_batch`."""
    return tuple(axis for axis in axes if axis not in of_batch or (of_experts and axis == _EXPERT))


def _ruled_label(dim: Dim, rules: Rules) -> str | None:
    """Return the first of the dim's labels that some rule speaks of."""
    return next((label for label in dim.labels if label in rules.declared or label in rules.defaults), None)


def _label_of_experts(dim: Dim, rules: Rules) -> str | None:
    """Return the label of a dim of experts, which needs no name unless rules of paths say where it lies."""
    said = any(_EXPERT in mentioned(rule) for key, rule in rules.declared.items() if is_pattern(key))
    return _ruled_label(dim, rules) or (None if said else _PURPOSE[_EXPERT])


def _rows_of_device(program: Program, rules: Rules, sizes: Mapping[str, int]) -> int:
    return batch_rows(program) // cut_into(_asked(rules, "batch", sizes), sizes)


def _check_batch(
    program: Program, rules: Rules, sizes: Mapping[str, int], microbatches: int
) -> tuple[str, ...]:
    """Return notes of what devices repeat. Raises UserError if the rows do not divide."""
    spread = rules.declared.get("batch", rules.defaults.get("batch", ()))
    parts = {axis: sizes[axis] for axis in spread if axis in sizes}
    devices = math.prod(parts.values())
    if microbatches < 1:
        raise UserError(f"microbatches={microbatches} must be a whole number of at least 1")
    needed, notes = devices * microbatches, ()
    led = [a.shape[0] for a in program.arguments if a.is_data and a.names[:1] == DATA_NAMES[:1]]
    if not led:
        # One row, or nothing that has any, lies whole on every device.
        led, needed = [batch_rows(program)], microbatches
        written = " x ".join(f"{axis}={size}" for axis, size in parts.items() if size > 1)
        if led[0] > 1 and devices > 1:
            met = rows_of_a_parameter(program)
            raise UserError(
                f"no array of the batch leads with rows of its own, which {written} could share out"
                + (f", since {met}: look those up by numbers that come with the rows, or" if met else ";")
                + ' give rules={"batch": None} to leave them whole'
            )
        if devices > 1:
            notes = (f"the batch has no rows to share out: every device along {written} does all its work",)
    for rows in led:
        if rows and rows % needed == 0:
            continue
        why, further = indivisible(rows, parts, microbatches, needed), rows_further_on(program)
        raise IndivisibleBatch(f"{why}; {further}" if further else why)
    return notes
