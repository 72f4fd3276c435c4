"""Plan: the record of a plan, with all that can be done with it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jax.sharding import AbstractMesh, Mesh

from ..errors import UserError
from ..planner.asked import with_asked
from ..planner.inputs import Problem
from ..planner.outcome import Search
from ..planner.prove import prove
from ..plans import arrays, file
from ..plans.record import Record, check_record, check_runs
from ..program.around import apart
from ..program.program import Program
from ..report.compare import Comparison, compare
from ..report.explain import explain
from ..report.html import fragment
from ..report.plan import plan_document
from ..transform import step
from ..transform.check import AccumulationCheck, check_accumulation
from ..transform.compose import PlannedLoss, apply
from ..transform.deviation import Deviation, deviation
from ..transform.nonfinite import FirstNotFinite, first_not_finite
from ..transform.rounds import count_rounds
from ..verify.process import Limits
from ..words import gib, layout_in_words, seconds

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """A mesh, how each array is sharded over it, and how a step is run: data, with methods that carry it out.

    `Record` and `Decision` have the fields that are saved and compared. A plan that was just made also knows
    the `problem` that it is for, the `optimizer` that it was planned with and the `search` that found it.

    >>> import jax
    >>> from meshwright.sharding import declare
    >>> def loss(params, x):
    ...     return ((x @ params["w"]) ** 2).mean()
    >>> params = {"w": jax.ShapeDtypeStruct((512, 512), "float32")}
    >>> x = jax.ShapeDtypeStruct((64, 512), "float32")
    >>> one = declare(loss, params, x, topology="v5e:2x4", mesh={"fsdp": 8}, rules={"*w": ["fsdp"]})
    >>> one.specs(params), one.bytes_per_device()
    ({'w': P('fsdp',)}, 131072)
    >>> Plan.from_dict(one.to_dict()) == one
    True
    """

    optimizer: Any = dataclasses.field(default=None, repr=False, compare=False)
    problem: Problem | None = dataclasses.field(default=None, repr=False, compare=False)
    search: Search | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, record: Record, **passing: Any) -> Plan:
        """Return the Plan of a record; `passing` are the fields that the record does not have."""
        check_record("record", record)
        return cls(**{**vars(record), **passing})

    def make_mesh(self, devices: Any = None) -> Mesh:
        """Return the plan's mesh over the topology's devices, or over `devices`.

        Raises:
          UserError: these devices, or those that are attached, are not the topology's.
        """
        return arrays.mesh_of(self, devices)

    def _over(self, mesh: Any) -> Any:
        return self.make_mesh() if mesh is None else mesh

    def specs(self, tree: Any, kind: str = "params") -> Any:
        """Return a tree like `tree` of PartitionSpecs.

        An optimizer's array lies as the parameter whose path its own path ends with, or without one as a
        parameter of its shape; one that lacks a dimension of it (factored moments) or has one more
        (histories) keeps the rest of the spec, and one that is flat is cut over the same axes. What belongs
        to no parameter is replicated, unless it is a hundredth of a device's memory: then it is cut over
        the axes that cut the parameters.

        Args:
          tree: parameters, a training state or a part of one; or a batch.
          kind: ``params`` for the former, ``batch`` for a batch, ``state`` for a loss's state by itself.

        Raises:
          UserError: a parameter or an array of the batch has another shape than the plan's.
        """
        return arrays.specs(self, tree, kind)

    def shardings(self, tree: Any, mesh: Mesh | AbstractMesh, kind: str = "params") -> Any:
        """Return a tree like `tree` of NamedShardings on `mesh`; arguments and errors are as of `specs`."""
        return arrays.shardings(self, tree, mesh, kind)

    def specs_of_moments(self, params: Any) -> Any:
        """Return a tree like `params` of the PartitionSpecs of gradients and moments."""
        return arrays.specs_of_moments(self, params)

    def axes_of_dims(self, program: Program) -> dict[int, tuple[str, ...]]:
        """Return dim → mesh axes for the dims of a traced `program`, by their ids."""
        return arrays.axes_of_dims(self, program)

    def bytes_per_device(self, kind: str = "params") -> int:
        """Return the bytes that one device holds of the parameters, or of the ``batch`` or ``state``."""
        return arrays.bytes_per_device(self, kind)

    def apply(self, loss: Callable[..., Any], mesh: Mesh | AbstractMesh | None = None) -> Callable[..., Any]:
        """Return `loss` with the plan's transforms around it: the same signature and the same values."""
        check_runs(self)
        return apply(self, loss, self._over(mesh))

    def train_step(
        self,
        loss: Callable[..., Any],
        optimizer: optax.GradientTransformation,
        mesh: Mesh | None = None,
        *,
        guard: bool | None = None,
    ) -> Callable[..., Any]:
        """Return the jitted ``(state, batch) -> (state, metrics)``, which donates the state.

        The state is that of `init`. Metrics are `loss`, `grad_norm` and the loss's auxiliary values by their
        paths. Once loss or gradients are not finite the state stays what it was, with ``state["stopped"]``
        set; `guard` False is without that, None is with it unless the optimizer deals with it itself.
        """
        over = self._over(mesh)
        planned = PlannedLoss(self, loss, over)
        return step.jitted_update(self, planned, optimizer, mesh=over, guard=guard)

    def init(
        self,
        init: Callable[[Any], Any],
        key: Any,
        optimizer: optax.GradientTransformation | None = None,
        mesh: Mesh | None = None,
    ) -> dict[str, Any]:
        """Return the first state of a run, each array created in shards.

        It is ``{"step", "params", "optimizer", "stopped"}``, see `transform.step.State`.

        Args:
          init: ``init(key)`` returns the parameters.
          key: a JAX key.
          optimizer: that of the planning if not given.
          mesh: the plan's own if not given.

        Raises:
          UserError: there is no optimizer, or the parameters are not those that the plan was made for.
        """
        if (optimizer := self.optimizer if optimizer is None else optimizer) is None:
            raise UserError("this plan knows no optimizer; write plan.init(init, key, optimizer)")
        return step.first_state(self, init, key, optimizer, mesh=self._over(mesh))

    @apart()
    def check_accumulation(
        self, loss: Callable[..., Any], params: Any, batch: Any, *state: Any, mesh: Mesh | None = None
    ) -> AccumulationCheck:
        """Try on real arrays whether two parts of a batch give the loss and the gradients of the whole.

        The planned loss is worked through whole, in two parts, and whole with its rows in another order, on
        as few rows of `batch` as the mesh can share out. Nothing is tried where the estimate says that it
        would not fit beside a run's state; the result says so.

        Args:
          loss: the function that the plan was made for.
          params: arrays, wherever they lie.
          batch: likewise, a global batch.
          state: likewise, of a loss with one.
          mesh: the plan's axes over devices, if not those of `make_mesh()`.

        Raises:
          UserError: the two differ by more than rounding, or the loss does not come in parts at all.
        """
        return check_accumulation(self, loss, params, batch, *state, mesh=self._over(mesh))

    def first_not_finite(
        self, loss: Callable[..., Any], params: Any, batch: Any, *state: Any, mesh: Mesh | None = None
    ) -> FirstNotFinite:
        """Return where `loss` or its gradients first have a value that is not finite; its text says it.

        Asked of a state whose ``stopped`` is set, which has the parameters of the step that failed, and of
        that step's batch. The step's loss and gradients are worked through once in another program, layers
        one at a time, which has to be compiled.

        Args:
          loss: the function that the plan was made for.
          params: arrays as `shardings` says.
          batch: likewise, a global batch.
          state: likewise, of a loss with one.
          mesh: the plan's axes over devices, if not those of `make_mesh()`.
        """
        return first_not_finite(self, loss, params, batch, *state, mesh=self._over(mesh))

    def count_rounds(
        self, loss: Callable[..., Any], params: Any, batch: Any, *state: Any, mesh: Mesh | None = None
    ) -> dict[int, int]:
        """Return rounds → how many exchanges of tokens with their experts take so many, of one batch.

        They are those of the forward pass, one for each layer of a mixture and microbatch; none where experts
        are not cut over an axis that cuts rows. The loss runs once in a program of its own; arguments are as
        in `first_not_finite`.
        """
        return count_rounds(self, loss, params, batch, *state, mesh=self._over(mesh))

    @apart()
    def deviation(
        self, loss: Callable[..., Any], params: Any, batch: Any, *state: Any, mesh: Mesh | None = None
    ) -> Deviation:
        """Return how far `loss` as planned is from the plain function, on small arrays; see `Deviation`.

        The arrays may be smaller than those of the plan, wherever they lie. `mesh` are the plan's axes over
        devices, if not those of `make_mesh()`. Raises UserError if an axis does not divide an array.
        """
        small = arrays.resized(self, params, batch, *state)
        return deviation(small, loss, params, batch, *state, mesh=self._over(mesh))

    @apart()
    def verify(
        self,
        loss: Callable[..., Any] | None = None,
        params: Any = None,
        batch: Any = None,
        optimizer: optax.GradientTransformation | None = None,
        *,
        state: Any = None,
        top: int = 1,
        limits: Limits | None = None,
        use_cache: bool = True,
        quick: bool = False,
    ) -> Plan:
        """Return the plan with its `proof`: its step compiled for the topology, which need not be attached.

        If a plan that was searched for does not fit, the next best that does is returned. A faster one of
        which only the compiler can say whether it fits, as a note of the plan says, is compiled first.

        Args:
          loss: the function; a plan that was just made knows it, as it knows the next three.
          params: its parameters: arrays or ShapeDtypeStructs.
          batch: likewise, the global batch.
          optimizer: of the step.
          state: of the loss, where the plan has one; a plan that was just made knows it too.
          top: above 1, so many layouts are compiled and the fastest by the compiler's word is returned.
          limits: of time and memory, for each compile.
          use_cache: whether a proof that was kept on disk will do.
          quick: whether a proof will do that is read as soon as the compiler has scheduled the step. For TPUs
            that is several times sooner: memory, collectives and their order are known by then, and computing
            is timed by flops and bytes (`Proof.quick`). Other compilers make the whole program all the same.

        Raises:
          UserError: nothing that was compiled fits, there is no compiler for the topology, or one of the
            first four is not known.
        """
        given = {"loss": loss, "params": params, "batch": batch, "optimizer": optimizer}
        for name, one in given.items():
            given[name] = getattr(self.problem, name, None) if one is None else one
            if given[name] is None:
                raise UserError(
                    f"this plan knows no {name}; write plan.verify(loss, params, batch, optimizer)"
                )
        given["state"] = getattr(self.problem, "state", None) if state is None else state
        fingerprint = None
        if self.problem is not None and given["loss"] is self.problem.loss:
            fingerprint = self.problem.program.fingerprint
        proved, search = prove(
            self,
            self.search,
            given,
            fingerprint=fingerprint,
            top=top,
            limits=limits,
            use_cache=use_cache,
            quick=quick,
        )
        return Plan.of(proved, optimizer=self.optimizer, problem=self.problem, search=search)

    @apart()
    def explain(self, subject: str | None = None) -> str:
        """Return why the plan is as it is.

        Args:
          subject: an axis (``tensor``), a size of one (``tensor=8``), how its stages work
            (``schedule=delayed``, ``interleave=4``, ``stage_remat=false``), a dimension or a parameter; all
            of the plan if not given. A size of an axis that is searched for only where it is declared
            (``stage=8``), and how stages work, is priced now, if the plan was just made.

        Raises:
          UserError: `subject` is none of these.
        """
        return explain(with_asked(self, self.search, subject), subject)

    def compare(self, other: Plan) -> Comparison:
        """Return this plan (A) and `other` (B) side by side, for a terminal or a notebook."""
        return compare(self, other)

    def __reduce__(self) -> tuple[Callable[..., Plan], tuple[dict[str, Any]]]:
        """Go to another process as what is saved: without the problem, the search and the optimizer."""
        return Plan.from_dict, (self.to_dict(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """Return itself, of which nothing changes."""
        return self

    def __repr__(self) -> str:
        """Say in a line what the plan is: all of its fields are tens of thousands of characters."""
        layout = layout_in_words(self.mesh, self.remat, self.microbatches, self.saved)
        said = [f"<Plan for {self.topology}: {layout}"]
        if self.estimate is not None and not self.topology.chip.nominal:
            said.append(f"{seconds(self.estimate.step_seconds)}, {gib(self.estimate.peak_bytes)} estimated")
        if self.proof is not None:
            said.append(f"{seconds(self.proof.step_seconds)}, {gib(self.proof.peak_bytes)} compiled")
        return "; ".join([*said, "explain() says why>"])

    def _repr_html_(self) -> str:
        """Show the plan in a notebook: mesh, time, memory, parameters, what else there was."""
        return fragment(plan_document(self))

    def check(
        self, params: Any, batch: Any, loss: Callable[..., Any] | None = None, state: Any = None
    ) -> None:
        """Raise UserError, naming the difference, if the plan was made for other arrays or another `loss`."""
        arrays.check(self, params, batch, loss, state)

    def check_arrays(self, kind: str, tree: Any) -> None:
        """Raise UserError if `tree` is not what the plan has: its ``parameter``, or other `kind` of array."""
        arrays.check_arrays(self, kind, tree)

    def resized(self, params: Any, batch: Any, state: Any = None) -> Plan:
        """Return the same layout for arrays of other sizes, such as a model of fewer layers.

        The estimate, the proof and what is remembered of the search are left out.

        Raises:
          UserError: a path is missing or new, or an axis does not divide a new size.
        """
        decision = arrays.resized(self, params, batch, state)
        return Plan(**vars(decision), notes=self.notes, optimizer=self.optimizer)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return file.to_dict(self)

    def save(self, path: str | pathlib.Path) -> None:
        """Write the plan as JSON, one line for each array, so that two files compare line by line."""
        file.write(self, path)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Plan:
        """Read a plan that `save` wrote. Raises UserError for a missing or malformed file."""
        return file.read(path, cls)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from plain record."""
        return file.from_dict(record, cls)
