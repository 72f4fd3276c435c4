"""A plan as data: what decides the program, how it came about, and what the compiler made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import UserError, nearest, nearest_divisors, wrong
from ..hardware.topology import Topology
from ..ops.context.ways import check_way
from ..ops.kernels import check_kernels
from ..program.recognise import FORMS, checked_forms
from .estimate import Estimate
from .origin import Alternative, Origin
from .proof import Proof
from .specs import Spec, axes_of, cut_into
from .vocabulary import DELAYED, EXACT, NAMES, ONE_BY_ONE, PLACES, check_accumulation, check_words


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayPlan:
    """How an array is sharded; its shape and dtype, by which a plan is refused for another program."""

    shape: tuple[int, ...]
    dtype: str
    spec: Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimPlan:
    """A named dimension and the mesh axes that shard it wherever it is computed with.

    The name is a label and may be missing in another trace of the same program, so the dimension is found
    again by its place: `argument` (0 the parameters, 1 the batch), the `path` of an array there, the
    `dimension` of that array, and the `part` of it, where it is split into several factors (as a
    reshape splits it).
    """

    size: int
    axes: tuple[str, ...]
    argument: int
    path: str
    dimension: int
    part: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What decides the program of a step: a mesh, where arrays lie on it, how the step is worked through.

    Attributes:
        topology: the devices; a description such as ``v5p:4x4x8`` is read into one.
        mesh: axis → size.
        dims: named dimension → the axes that shard it while computing.
        params: path → how a parameter is stored.
        batch: path → how an array of the global batch lies.
        moments: path of a parameter → the spec of its gradient and its optimizer's arrays, where that is
            another than the parameter's.
        trainable: the paths of the parameters that are trained; None where all floats are.
        state: path → how an array of what changes beside the parameters is stored; None where the loss has no
            state.
        remat: what layers keep for their backward pass, a word of `vocabulary.REMATS` or ``names``.
        saved: under ``names``, kept value → its place.
        microbatches: parts that the batch is worked through in.
        accumulation: how the parts go together: ``exact``, to the whole batch's value and gradients, or ``by
            part``, to the mean of the parts'.
        schedule: the order in which pipeline stages take microbatches, a word of `vocabulary.SCHEDULES`;
            ``gpipe`` can be priced, not yet run.
        interleave: model chunks that a pipeline stage holds.
        stage_remat: whether a stage keeps its chunks' inputs alone and runs them again on the way back, or
            what `remat` keeps of their layers.
        kernels: ``attention`` → the kernel that carries it out and the sizes of its blocks, where that is not
            XLA's own; likewise ``experts``; ``arithmetic`` → what of products and look-ups is not as JAX does
            it.
        context: how attention goes over the mesh axis `context`, a word of `ops.context.ways.WAYS`; None
            where XLA gathers.
        compiler_options: XLA's, for this step.
        recognise: forms of the program that are rewritten where they are found, of `program.recognise.FORMS`.
        calibration: digest of the measured efficiencies that it was planned by, None for the shipped ones.

    Raises:
        UserError: an axis, policy, place or kernel is not known, or an axis does not divide a dimension.
    """

    topology: Topology
    mesh: Mapping[str, int]
    dims: Mapping[str, DimPlan]
    params: Mapping[str, ArrayPlan]
    batch: Mapping[str, ArrayPlan]
    remat: str = "none"
    saved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    microbatches: int = 1
    accumulation: str = EXACT
    schedule: str | None = None
    interleave: int = 1
    stage_remat: bool = True
    moments: Mapping[str, Spec] = dataclasses.field(default_factory=dict)
    trainable: tuple[str, ...] | None = None
    state: Mapping[str, ArrayPlan] | None = None
    kernels: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    compiler_options: Mapping[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    recognise: tuple[str, ...] = FORMS
    context: str | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "recognise", checked_forms(self.recognise))
        if not isinstance(self.topology, Topology):
            object.__setattr__(self, "topology", Topology.parse(self.topology))
        _check(self)

    @property
    def way(self) -> tuple[str, int, bool]:
        """How stages work: schedule, chunks of each, and whether they run these again."""
        return self.schedule or ONE_BY_ONE, self.interleave, self.stage_remat

    def decision(self) -> Decision:
        """Return what decides the program and nothing else; equal decisions give equal programs."""
        return Decision(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Decision)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(Decision):
    """A decision with how it came about and what the compiler made of it.

    Attributes:
        notes: sentences on what could not be had or should be known.
        stacks: where stages cut several stacks of layers, a name of each, as they run → its layers.
        origin: the program that it is for.
        estimate: its predicted cost.
        alternatives: layouts that it was preferred to, each with the reason.
        refused: what was not considered (``tensor=3``) → the reason.
        proof: what the compiler made of it, where that was asked.
    """

    notes: tuple[str, ...] = ()
    stacks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    origin: Origin | None = None
    estimate: Estimate | None = None
    alternatives: tuple[Alternative, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    proof: Proof | None = None


def check_record(name: str, plan: Any) -> None:
    """Raise UserError for what is no plan at all."""
    if not isinstance(plan, Record):
        raise wrong(name, plan, "is no plan; meshwright.sharding.plan and declare return one")


def check_runs(plan: Decision) -> None:
    """Raise UserError for a plan that can be priced and cannot be run yet."""
    stages = plan.mesh.get("stage", 1)
    if stages == 1:
        return
    if plan.schedule not in (None, ONE_BY_ONE, DELAYED):
        raise UserError(
            f"stage={stages} runs in 1F1B with any number of chunks, or with schedule={DELAYED!r}; "
            f"schedule={plan.schedule!r} is priced by the planner and cannot be run yet"
        )
    if plan.accumulation != EXACT:
        raise UserError(f"stage={stages} sums microbatches exactly; plan without accumulation='by part'")
    check_stages_keep(plan.stage_remat, plan.remat)


def check_stages_keep(stage_remat: bool, remat: str) -> None:
    """Raise UserError if stages would keep all that gradients read, parameters as they are used included."""
    if not stage_remat and remat == "none":
        raise UserError(
            "stage_remat=False keeps what remat keeps of layers until their stage goes back; remat='none' "
            "would keep their parameters too, for each microbatch; nearest: remat='dots', 'full', or names"
        )


def _check(plan: Decision) -> None:
    """Raise UserError, one sentence, for the first thing in `plan` that cannot be carried out."""
    check_words(plan.mesh, plan.remat, plan.schedule)
    check_accumulation(plan.accumulation)
    for name, place in plan.saved.items():
        if place not in PLACES:
            raise UserError(f"{name} is kept on {place!r}; {nearest(place, PLACES)}")
    if plan.saved and plan.remat != NAMES:
        raise UserError(f"remat={plan.remat!r} keeps no named values; remat='names' does")
    check_kernels(plan.kernels)
    check_way(plan.context)
    counts = {**plan.mesh, "microbatches": plan.microbatches, "interleave": plan.interleave}
    for name, size in counts.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"{name}={size!r} must be a whole number of at least 1")
    tables = {"parameter": plan.params, "batch array": plan.batch, "state array": plan.state or {}}
    for kind, arrays in tables.items():
        for path, row in arrays.items():
            _check_array(plan, f"{kind} {path!r}", row)
    for path in plan.trainable or ():
        if path not in plan.params:
            raise UserError(f"trainable has {path!r}, which is no parameter; {nearest(path, plan.params)}")
    for name, dim in plan.dims.items():
        _check_axes(plan, f"dimension {name!r}", dim.axes)


def _check_array(plan: Decision, what: str, row: ArrayPlan) -> None:
    if len(row.spec) > len(row.shape):
        raise UserError(
            f"{what} has {len(row.shape)} dimensions but its spec {row.spec} has {len(row.spec)} entries"
        )
    entries = [axes_of(entry) for entry in row.spec]
    _check_axes(plan, what, tuple(axis for entry in entries for axis in entry))
    for size, axes in zip(row.shape, entries, strict=False):
        parts = cut_into(axes, plan.mesh)
        if size % parts:
            written = " x ".join(f"{axis}={plan.mesh[axis]}" for axis in axes)
            near = nearest_divisors(size, parts)
            raise UserError(f"{what}: {written} does not divide a dimension of size {size}; nearest: {near}")


def _check_axes(plan: Decision, what: str, axes: tuple[str, ...]) -> None:
    for axis in axes:
        if axis not in plan.mesh:
            raise UserError(f"{what} is sharded over {axis!r}; {nearest(axis, plan.mesh)}")
        if axes.count(axis) > 1:
            raise UserError(f"{what} uses {axis} twice; an axis shards one dimension at most")
