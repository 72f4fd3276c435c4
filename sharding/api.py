"""The Python door: `plan`, `declare`, and the Plan that both give, with all that can be done with it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jax.sharding import AbstractMesh, Mesh

from .errors import UserError
from .hardware.topology import Topology
from .planner.declared import Declared
from .planner.inputs import Problem
from .planner.outcome import Search, best_of, declared_plan
from .planner.prove import prove
from .plans import arrays, file
from .plans.record import Record, check_runs
from .program.program import Program
from .report.compare import Comparison, compare
from .report.explain import explain
from .report.html import fragment
from .report.plan import plan_document
from .transform import step
from .transform.compose import apply
from .verify.process import Limits

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """A mesh, where each array lies on it, and how the step is worked through; `Record` has the fields.

    A plan is data that can be read, compared and committed, with what can be done with it. One that was just
    made also knows the `problem` that it is for, the `optimizer` of the planning, and the `search` that found
    it; they are no part of the record.
    """

    optimizer: Any = dataclasses.field(default=None, repr=False, compare=False)
    problem: Problem | None = dataclasses.field(default=None, repr=False, compare=False)
    search: Search | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, record: Record, **passing: Any) -> Plan:
        """Return the Plan of a record; `passing` are the fields that are no part of it."""
        return cls(
            **{field.name: getattr(record, field.name) for field in dataclasses.fields(Record)}, **passing
        )

    def make_mesh(self, devices: Any = None) -> Mesh:
        """Return the plan's mesh over the topology's devices, or over `devices`."""
        return arrays.mesh_of(self, devices)

    def specs(self, tree: Any, kind: str = "params") -> Any:
        """Return the PartitionSpec of every array in a tree of parameters or optimiser state, or a ``batch``.

        An optimiser's array belongs to the parameter whose path its own path ends with; one that has lost
        a dimension of it (factored moments) keeps the rest of its spec. Arrays that belong to nothing, such
        as counters, are replicated. Raises UserError if a parameter or batch array has another shape.
        """
        return arrays.specs(self, tree, kind)

    def shardings(self, tree: Any, mesh: Mesh | AbstractMesh, kind: str = "params") -> Any:
        """Return the NamedSharding of every array in `tree`, as `specs` does."""
        return arrays.shardings(self, tree, mesh, kind)

    def specs_of_moments(self, params: Any) -> Any:
        """Return the PartitionSpec of every parameter's gradient and moments, in a tree of parameters."""
        return arrays.specs_of_moments(self, params)

    def axes_of_dims(self, program: Program) -> dict[int, tuple[str, ...]]:
        """Return the mesh axes of the dims of a traced `program`, by their numbers."""
        return arrays.axes_of_dims(self, program)

    def bytes_per_device(self, kind: str = "params") -> int:
        """Return the bytes of the parameters (or ``batch``) that one device holds."""
        return arrays.bytes_per_device(self, kind)

    def apply(self, loss: Callable[..., Any], mesh: Mesh | AbstractMesh | None = None) -> Callable[..., Any]:
        """Return `loss(params, batch)` worked through as planned on `mesh`: same signature, same values."""
        check_runs(self)
        return apply(self, loss, self.make_mesh() if mesh is None else mesh)

    def train_step(
        self, loss: Callable[..., Any], optimizer: optax.GradientTransformation, mesh: Mesh | None = None
    ) -> Callable[..., Any]:
        """Return the jitted ``(state, batch) -> (state, metrics)``, which donates the state."""
        return step.jitted_update(self, loss, optimizer, mesh=self.make_mesh() if mesh is None else mesh)

    def init(
        self,
        init: Callable[[Any], Any],
        key: Any,
        optimizer: optax.GradientTransformation | None = None,
        mesh: Mesh | None = None,
    ) -> dict[str, Any]:
        """Return the first state of a run, ``{"step", "params", "optimizer"}``, every array where it belongs.

        `init(key)` gives the parameters; `optimizer` is that of the planning if not given. Raises UserError
        if there is neither, or if the parameters are not those that the plan was made for.
        """
        optimizer = self.optimizer if optimizer is None else optimizer
        if optimizer is None:
            raise UserError("this plan knows no optimizer; write plan.init(init, key, optimizer)")
        return step.first_state(self, init, key, optimizer, mesh=self.make_mesh() if mesh is None else mesh)

    def verify(
        self,
        loss: Callable[..., Any] | None = None,
        params: Any = None,
        batch: Any = None,
        optimizer: optax.GradientTransformation | None = None,
        *,
        top: int = 1,
        limits: Limits | None = None,
        use_cache: bool = True,
    ) -> Plan:
        """Compile the step for the plan's topology, which need not be here; return the plan with its `proof`.

        A plan that was just made knows its program; one that was loaded is given it. If a plan that was
        searched for does not fit, the next best that does is returned; with `top` above 1 so many layouts are
        compiled and the fastest by the compiler's word is returned. `limits` bound the time and memory of
        each compile. Raises UserError if nothing compiled fits, or if there is no compiler for the topology.
        """
        given = {"loss": loss, "params": params, "batch": batch, "optimizer": optimizer}
        if self.problem is not None:
            given = {name: getattr(self.problem, name) if one is None else one for name, one in given.items()}
        for name, one in given.items():
            if one is None:
                raise UserError(
                    f"this plan knows no {name}; write plan.verify(loss, params, batch, optimizer)"
                )
        known = self.problem is not None and given["loss"] is self.problem.loss
        fingerprint = self.problem.program.fingerprint if self.problem is not None and known else None
        proved, search = prove(
            self,
            self.search,
            given,
            fingerprint=fingerprint,
            top=top,
            limits=limits,
            use_cache=use_cache,
        )
        return Plan.of(proved, optimizer=self.optimizer, problem=self.problem, search=search)

    def explain(self, subject: str | None = None) -> str:
        """Return why the plan is as it is: all of it, or an axis (``tensor``, ``tensor=8``), a dimension or a
        parameter.

        Raises UserError if `subject` is none of these.
        """
        return explain(self, subject)

    def compare(self, other: Plan) -> Comparison:
        """Return this plan (A) and `other` (B) side by side, as a terminal or a notebook shows it."""
        return compare(self, other)

    def _repr_html_(self) -> str:
        """Show the plan in a notebook: mesh, time, memory, parameters, what else there was."""
        return fragment(plan_document(self))

    def check(self, params: Any, batch: Any, loss: Callable[..., Any] | None = None) -> None:
        """Raise UserError, naming what differs, if the plan was made for other arrays or another `loss`."""
        arrays.check(self, params, batch, loss)

    def check_arrays(self, kind: str, tree: Any) -> None:
        """Raise UserError if `tree` is not what the plan has of a ``parameter`` or ``batch array``."""
        arrays.check_arrays(self, kind, tree)

    def resized(self, params: Any, batch: Any) -> Plan:
        """Return the same layout for arrays of other sizes, such as a model of fewer layers.

        What was estimated, proved and remembered of the search held for the old sizes and is left out. Raises
        UserError if a path is missing or new, or if an axis does not divide a new size.
        """
        decision = arrays.resized(self, params, batch)
        kept = {field.name: getattr(decision, field.name) for field in dataclasses.fields(decision)}
        return Plan(**kept, notes=self.notes, optimizer=self.optimizer)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return file.to_dict(self)

    def save(self, path: str | pathlib.Path) -> None:
        """Write the plan as JSON with one line an array, so that two plans compare line by line."""
        file.write(self, path)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Plan:
        """Read a plan that `save` wrote. Raises UserError for a missing or malformed file."""
        return file.read(path, cls)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from plain record."""
        return file.from_dict(record, cls)


def plan(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    *,
    topology: Topology | str,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mapping[str, int] | None = None,
    rules: Mapping[str, Any] | None = None,
    remat: str | Mapping[str, str] | None = None,
    microbatches: int | None = None,
    schedule: str | None = None,
    attention: str | None = None,
    names: Any = None,
) -> Plan:
    """Return the fastest Plan for training ``loss(params, batch)`` on `topology` that fits its memory.

    What is declared is kept, the rest is derived. On simulated devices, whose links and memory are of no real
    part, what stores least on a device comes first and time decides among equals.

    Args:
        loss: the unsharded function, to a scalar or ``(scalar, aux)``; it is traced, not run.
        params: a tree of arrays or ShapeDtypeStructs.
        batch: likewise, the global batch.
        topology: the devices, such as ``v5p:4x4x8``.
        optimizer: whose moments must fit; Adam's in float32 are assumed without one.
        mesh: sizes of some axes; -1 takes all that the others leave.
        rules: named dimension or path pattern → axes, as in `Rules`.
        remat: ``none``, ``dots`` or ``full``, or the values of layers that are kept (see
            `meshwright.sharding.program.saved`) → ``device`` or ``host``.
        microbatches: parts that the batch is worked through in.
        schedule: of declared pipeline stages: ``1f1b`` or ``gpipe``.
        attention: what carries out calls of `meshwright.sharding.ops.attention`: ``xla``, or a kernel,
            ``splash`` or ``cudnn``; ``auto``, the default, is the chip's own where it can do what is asked.
        names: a tree parallel to `params` of tuples of dimension names, for rules and for what is printed.

    Raises:
        UserError: the declared parts contradict each other, the program or the topology, or nothing fits.
    """
    declared = Declared(
        mesh=mesh or {},
        rules=rules or {},
        remat=remat,
        microbatches=microbatches,
        schedule=schedule,
        attention=attention,
    )
    problem = Problem(loss=loss, params=params, batch=batch, optimizer=optimizer, names=names)
    found, search = best_of(problem, Topology.parse(topology), declared)
    return Plan.of(found, optimizer=optimizer, problem=problem, search=search)


def declare(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    *,
    topology: Topology | str,
    mesh: Mapping[str, int],
    optimizer: optax.GradientTransformation | None = None,
    rules: Mapping[str, Any] | None = None,
    names: Any = None,
    remat: str | Mapping[str, str] = "none",
    microbatches: int = 1,
    attention: str | None = None,
) -> Plan:
    """Return the Plan that the declared `mesh` and `rules` make of ``loss(params, batch)``.

    It is estimated as what `plan` finds is, and never refused for its estimate: `notes` say where that warns.

    Args:
        loss: the unsharded function; it is traced, not run.
        params: a tree of arrays or ShapeDtypeStructs.
        batch: likewise, the global batch; its arrays are ``[batch, ...]`` or ``[batch, sequence, ...]``.
        topology: the devices.
        mesh: axis → size, one of which may be -1.
        optimizer: whose moments are estimated; Adam's in float32 without one.
        rules: named dimension or path pattern → axes, over the defaults of `Rules.with_defaults`.
        names: a tree parallel to `params` of tuples of dimension names.
        remat: what layers keep for their backward pass: a policy of `transform.remat`, or names → places.
        microbatches: parts that the batch is worked through in, as in `transform.accumulate`.
        attention: as in `plan`: ``auto`` if not given.

    Raises:
        UserError: the mesh does not fit the topology, a rule cannot hold, or the batch does not divide.
    """
    problem = Problem(loss=loss, params=params, batch=batch, optimizer=optimizer, names=names)
    declared = Declared(
        mesh=mesh, rules=rules or {}, remat=remat, microbatches=microbatches, attention=attention
    )
    made = declared_plan(problem, Topology.parse(topology), declared)
    return Plan.of(made, optimizer=optimizer, problem=problem)
