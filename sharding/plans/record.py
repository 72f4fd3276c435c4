"""The Plan: how a program is spread over devices, as data that can be read, compared and committed."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest, nearest_divisors
from ..hardware.axes import AXES
from ..paths import by_path, by_suffix, path_of
from . import file as plan_file

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

    from ..cost.estimate import Estimate
    from ..planner.door import Search
    from ..program.program import Program
    from ..report.compare import Comparison
    from ..verify.process import Limits
    from .origin import Alternative, Origin
    from .proof import Proof


# One entry an array dimension: no axis, one, or several with the major one first.
Spec = tuple[str | tuple[str, ...] | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayPlan:
    """An array's shape and dtype, which tell a plan's own program from another, and its sharding."""

    shape: tuple[int, ...]
    dtype: str
    spec: Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimPlan:
    """A named dimension and the mesh axes that shard it wherever it is computed with.

    `argument` (0 the parameters, 1 the batch), `path`, `dimension` and `part` say where it stands, so that
    it is found again in a program that nobody has named.
    """

    size: int
    axes: tuple[str, ...]
    argument: int
    path: str
    dimension: int
    part: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A mesh, where each array lies on it, and how the step is worked through.

    `topology` is the devices' description (`v5p:4x4x8`), `mesh` maps axis → size, `dims` maps named
    dimension → DimPlan, `params` and `batch` map path → ArrayPlan: how arrays are stored. `remat`, `saved`
    and `microbatches` are as in `meshwright.sharding.transform`; `schedule` (``1f1b`` or ``gpipe``) and
    `interleave`, the model chunks of a stage, are those of pipeline stages, which can be priced and not yet
    run; `notes` say what could not be had. `moments` maps the path of a parameter to the spec of its gradient
    and its optimizer's arrays where that is another. `kernels` maps ``attention`` to the kernel that carries
    it out and the sizes of its blocks, where that is not XLA's own.

    A plan that was searched for also has its `estimate`, the `alternatives` it was preferred to, what was
    `refused` outright (``tensor=3`` → reason) and its `origin`, the program it is for. `compiler_options` are
    XLA's for this step, and `proof` is what the compiler made of it, where it was asked. `optimizer` is that
    of the planning, for `init`, and `search` what the planning went through; they are no part of the record.
    """

    topology: str
    mesh: Mapping[str, int]
    dims: Mapping[str, DimPlan]
    params: Mapping[str, ArrayPlan]
    batch: Mapping[str, ArrayPlan]
    remat: str = "none"
    saved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    microbatches: int = 1
    schedule: str | None = None
    interleave: int = 1
    notes: tuple[str, ...] = ()
    moments: Mapping[str, Spec] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    origin: Origin | None = None
    estimate: Estimate | None = None
    alternatives: tuple[Alternative, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    compiler_options: Mapping[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    proof: Proof | None = None
    optimizer: Any = dataclasses.field(default=None, repr=False, compare=False)
    search: Search | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be carried out: unknown axes, sizes that do not divide."""
        check_plan(self)

    def make_mesh(self, devices: Any = None) -> Mesh:
        """Return the plan's mesh over the topology's devices, or over `devices`."""
        from ..hardware.mesh import make_mesh
        from ..hardware.topology import Topology

        return make_mesh(self.mesh, Topology.parse(self.topology), devices=devices)

    def specs(self, tree: Any, kind: str = "params") -> Any:
        """Return the PartitionSpec of every array in a tree of parameters or optimiser state, or a ``batch``.

        An optimiser's array belongs to the parameter whose path its own path ends with; one that has lost
        a dimension of it (factored moments) keeps the rest of its spec. Arrays that belong to nothing, such
        as counters, are replicated. Raises UserError if a parameter or batch array has another shape.
        """
        import jax
        from jax.sharding import PartitionSpec

        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: PartitionSpec(*self._spec(path_of(keys), tuple(leaf.shape), kind)), tree
        )

    def shardings(self, tree: Any, mesh: Mesh | AbstractMesh, kind: str = "params") -> Any:
        """Return the NamedSharding of every array in `tree`, as `specs` does."""
        import jax
        from jax.sharding import NamedSharding

        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(tree, kind))

    def apply(self, loss: Callable[..., Any], mesh: Mesh | AbstractMesh | None = None) -> Callable[..., Any]:
        """Return `loss(params, batch)` worked through as planned on `mesh`: same signature, same values."""
        from ..hardware.topology import Topology
        from ..transform.accumulate import accumulate
        from ..transform.constrain import constrain
        from ..transform.name import name_values
        from ..transform.remat import remat
        from ..xla.reduction import reduction_steps

        check_runs(self)
        mesh = self.make_mesh() if mesh is None else mesh
        named = name_values(loss, self.saved) if self.saved else loss
        sharded = constrain(
            named,
            mesh,
            self.axes_of_dims,
            self.specs,
            self.specs_of_moments,
            kernels=self.kernels,
            platform=self._platform(mesh),
            steps=reduction_steps(self.mesh, Topology.parse(self.topology), self.compiler_options),
        )
        return accumulate(remat(sharded, self.remat, self.saved), self.microbatches)

    def train_step(self, loss: Callable[..., Any], optimizer: Any, mesh: Mesh | None = None) -> Callable:
        """Return the jitted ``(state, batch) -> (state, metrics)``, which donates the state."""
        from ..transform.step import jitted_update

        return jitted_update(self, loss, optimizer, mesh=self.make_mesh() if mesh is None else mesh)

    def init(
        self, init: Callable[[Any], Any], key: Any, optimizer: Any = None, mesh: Mesh | None = None
    ) -> dict[str, Any]:
        """Return the first state of a run, ``{"step", "params", "optimizer"}``, every array where it belongs.

        `init(key)` gives the parameters; `optimizer` is that of the planning if not given. Raises UserError
        if there is neither, or if the parameters are not those that the plan was made for.
        """
        from ..transform.step import first_state

        optimizer = self.optimizer if optimizer is None else optimizer
        if optimizer is None:
            raise UserError("this plan knows no optimizer; write plan.init(init, key, optimizer)")
        return first_state(self, init, key, optimizer, mesh=self.make_mesh() if mesh is None else mesh)

    def verify(
        self,
        loss: Callable[..., Any] | None = None,
        params: Any = None,
        batch: Any = None,
        optimizer: Any = None,
        *,
        top: int = 1,
        limits: Limits | None = None,
        use_cache: bool = True,
    ) -> Plan:
        """Compile the step for the plan's topology, which need not be here; return the plan with its `proof`.

        A plan that was just searched for knows its program; one that was loaded is given it. If it does not
        fit, the next best that does is returned; with `top` above 1 so many layouts are compiled and the
        fastest by the compiler's word is returned. `limits` bound the time and memory of each compile. Raises
        UserError if nothing compiled fits, or if there is no compiler for the topology.
        """
        from ..planner.prove import prove

        return prove(self, (loss, params, batch, optimizer), top=top, limits=limits, use_cache=use_cache)

    def explain(self, subject: str | None = None) -> str:
        """Return why the plan is as it is: all of it, or an axis (``tensor``, ``tensor=8``), a dimension or a
        parameter.

        Raises UserError if `subject` is none of these.
        """
        from ..report.explain import explain

        return explain(self, subject)

    def compare(self, other: Plan) -> Comparison:
        """Return this plan (A) and `other` (B) side by side, as a terminal or a notebook shows it."""
        from ..report.compare import compare

        return compare(self, other)

    def _repr_html_(self) -> str:
        """Show the plan in a notebook: mesh, time, memory, parameters, what else there was."""
        from ..report.page import fragment

        return fragment(self)

    def specs_of_moments(self, params: Any) -> Any:
        """Return the PartitionSpec of every parameter's gradient and moments, in a tree of parameters."""
        import jax
        from jax.sharding import PartitionSpec

        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: PartitionSpec(
                *self.moments.get(path_of(keys), self._spec(path_of(keys), tuple(leaf.shape), "params"))
            ),
            params,
        )

    def axes_of_dims(self, program: Program) -> dict[int, tuple[str, ...]]:
        """Return the mesh axes of the dims of a traced `program`, by their numbers."""
        at = {(a.position, a.path): a.dims for a in program.arguments}
        return {
            at[row.argument, row.path][row.dimension][row.part]: row.axes
            for row in self.dims.values()
            if row.axes
        }

    def check(self, params: Any, batch: Any, loss: Callable[..., Any] | None = None) -> None:
        """Raise UserError, naming what differs, if the plan was made for other arrays or another `loss`."""
        self.check_arrays("parameter", params)
        self.check_arrays("batch array", batch)
        if loss is not None and self.origin is not None:
            self.origin.check_loss(loss, params, batch)

    def check_arrays(self, kind: str, tree: Any) -> None:
        """Raise UserError if `tree` is not what the plan has of a ``parameter`` or ``batch array``."""
        planned = self.params if kind == "parameter" else self.batch
        have = {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}
        for path in [*planned, *have]:
            if path not in have:
                raise UserError(
                    f"the plan has a {kind} {path!r} that the program lacks; {nearest(path, have)}"
                )
            if path not in planned:
                raise UserError(
                    f"the program has a {kind} {path!r} that the plan lacks; {nearest(path, planned)}"
                )
            if planned[path].shape != have[path]:
                raise UserError(
                    f"{kind} {path!r} has shape {have[path]}; the plan was made for {planned[path].shape}"
                )

    def resized(self, params: Any, batch: Any) -> Plan:
        """Return the same layout for arrays of other sizes, such as a model of fewer layers.

        What was estimated, proved and remembered of the search held for the old sizes and is left out. Raises
        UserError if a path is missing or new, or if an axis does not divide a new size.
        """
        from .specs import resized

        return resized(self, params, batch)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return plan_file.to_dict(self)

    def save(self, path: str | pathlib.Path) -> None:
        """Write the plan as JSON with one line an array, so that two plans compare line by line."""
        plan_file.write(self, path)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Plan:
        """Read a plan that `save` wrote. Raises UserError for a missing or malformed file."""
        return plan_file.read(path)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from plain values."""
        return plan_file.from_dict(record)

    def _platform(self, mesh: Any) -> str:
        """Return what is compiled for: what the mesh's devices are, or those described if it has none."""
        from jax.sharding import Mesh

        from ..hardware.topology import Topology

        if isinstance(mesh, Mesh):
            return mesh.devices.flat[0].platform
        return Topology.parse(self.topology).chip.platform

    def _spec(self, path: str, shape: tuple[int, ...], kind: str) -> Spec:
        planned = getattr(self, kind).get(path)
        if planned is not None:
            if planned.shape != shape:
                raise UserError(f"{path!r} has shape {shape}; the plan was made for {planned.shape}")
            return planned.spec
        owner = by_suffix(path, self.params) if kind == "params" else None
        if owner is None:
            return ()
        row = self.params[owner]
        # In a whole training state the parameters themselves stand below ``params``.
        if owner in self.moments and path != f"params/{owner}":
            row = dataclasses.replace(row, spec=self.moments[owner])
        return self._derived(row, shape)

    def _derived(self, owner: ArrayPlan, shape: tuple[int, ...]) -> Spec:
        if shape == owner.shape:
            return owner.spec
        padded = owner.spec + (None,) * (len(owner.shape) - len(owner.spec))
        for lost in range(len(owner.shape)):
            if owner.shape[:lost] + owner.shape[lost + 1 :] == shape:
                return padded[:lost] + padded[lost + 1 :]
        return ()

    def bytes_per_device(self, kind: str = "params") -> int:
        """Bytes of the parameters (or ``batch``) that one device holds."""
        import jax.numpy as jnp

        total = 0
        for row in getattr(self, kind).values():
            parts = math.prod(math.prod(self.mesh[axis] for axis in axes_of(entry)) for entry in row.spec)
            total += math.prod(row.shape) * jnp.dtype(row.dtype).itemsize // parts
        return total


def check_plan(plan: Plan) -> None:
    """Raise UserError, one sentence, for the first thing in `plan` that cannot be carried out."""
    from ..cost.candidate import SCHEDULES
    from ..planner.choices.attention import check_kernels
    from ..transform.remat import NAMES, PLACES, POLICIES

    if plan.remat not in (*POLICIES, NAMES):
        raise UserError(f"remat={plan.remat!r} is not a policy; {nearest(plan.remat, POLICIES)}")
    for name, place in plan.saved.items():
        if place not in PLACES:
            raise UserError(f"{name} is kept on {place!r}; {nearest(place, PLACES)}")
    if plan.saved and plan.remat != NAMES:
        raise UserError(f"remat={plan.remat!r} keeps no named values; remat='names' does")
    check_kernels(plan.kernels)
    for name, size in (
        *plan.mesh.items(),
        ("microbatches", plan.microbatches),
        ("interleave", plan.interleave),
    ):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"{name}={size!r} must be a whole number of at least 1")
    if plan.schedule is not None and plan.schedule not in SCHEDULES:
        raise UserError(f"schedule={plan.schedule!r} is unknown; {nearest(plan.schedule, SCHEDULES)}")
    for axis in plan.mesh:
        if axis not in AXES:
            raise UserError(f"mesh axis {axis!r} is not known; {nearest(axis, AXES)}")
    for kind, arrays in (("parameter", plan.params), ("batch array", plan.batch)):
        for path, row in arrays.items():
            _check_array(plan, f"{kind} {path!r}", row)
    for name, dim in plan.dims.items():
        _check_axes(plan, f"dimension {name!r}", dim.axes)


def check_runs(plan: Plan) -> None:
    """Raise UserError for a plan that can be priced and cannot be run yet."""
    if plan.mesh.get("stage", 1) > 1:
        raise UserError(
            f"stage={plan.mesh['stage']}: pipeline stages are priced by the planner and cannot be run yet; "
            "plan without the stage axis"
        )


def _check_array(plan: Plan, what: str, row: ArrayPlan) -> None:
    if len(row.spec) > len(row.shape):
        raise UserError(
            f"{what} has {len(row.shape)} dimensions but its spec {row.spec} has {len(row.spec)} entries"
        )
    entries = [axes_of(entry) for entry in row.spec]
    _check_axes(plan, what, tuple(axis for entry in entries for axis in entry))
    for size, axes in zip(row.shape, entries, strict=False):
        parts = math.prod(plan.mesh[axis] for axis in axes)
        if size % parts:
            written = " x ".join(f"{axis}={plan.mesh[axis]}" for axis in axes)
            near = nearest_divisors(size, parts)
            raise UserError(f"{what}: {written} does not divide a dimension of size {size}; nearest: {near}")


def _check_axes(plan: Plan, what: str, axes: tuple[str, ...]) -> None:
    for axis in axes:
        if axis not in plan.mesh:
            raise UserError(f"{what} is sharded over {axis!r}; {nearest(axis, plan.mesh)}")
        if axes.count(axis) > 1:
            raise UserError(f"{what} uses {axis} twice; an axis shards one dimension at most")


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes that one entry of a spec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
