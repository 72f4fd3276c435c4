"""Public functions `plan` and `declare`, and the Plan that both return, with all that can be done with it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jax.sharding import AbstractMesh, Mesh

from .errors import UserError
from .hardware.topology import Topology
from .planner.asked import with_asked
from .planner.declared import Declared
from .planner.inputs import Problem, problem_of
from .planner.outcome import Search, best_of, declared_plan
from .planner.prove import prove
from .plans import arrays, file
from .plans.record import Record, check_record, check_runs
from .plans.vocabulary import EXACT
from .program.program import Program
from .program.recognise import FORMS
from .report.compare import Comparison, compare
from .report.explain import explain
from .report.html import fragment
from .report.plan import plan_document
from .transform import step
from .transform.accumulation.proof import MAX_PASSES
from .transform.check import AccumulationCheck, check_accumulation
from .transform.compose import PlannedLoss, apply
from .transform.deviation import Deviation, deviation
from .verify.process import Limits

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """A mesh, how each array is sharded over it, and how a step is run: data, with methods that carry it out.

    `Record` and `Decision` have the fields that are saved and compared. A plan that was just made also knows
    the `problem` that it is for, the `optimizer` that it was planned with and the `search` that found it.

    >>> import jax
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

    def deviation(
        self, loss: Callable[..., Any], params: Any, batch: Any, *state: Any, mesh: Mesh | None = None
    ) -> Deviation:
        """Return how far `loss` as planned is from the plain function, on small arrays; see `Deviation`.

        The arrays may be smaller than those of the plan, wherever they lie. `mesh` are the plan's axes over
        devices, if not those of `make_mesh()`. Raises UserError if an axis does not divide an array.
        """
        small = arrays.resized(self, params, batch, *state)
        return deviation(small, loss, params, batch, *state, mesh=self._over(mesh))

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
    ) -> Plan:
        """Return the plan with its `proof`: its step compiled for the topology, which need not be attached.

        If a plan that was searched for does not fit, the next best that does is returned.

        Args:
          loss: the function; a plan that was just made knows it, as it knows the next three.
          params: its parameters: arrays or ShapeDtypeStructs.
          batch: likewise, the global batch.
          optimizer: of the step.
          state: of the loss, where the plan has one; a plan that was just made knows it too.
          top: above 1, so many layouts are compiled and the fastest by the compiler's word is returned.
          limits: of time and memory, for each compile.
          use_cache: whether a proof that was kept on disk will do.

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
        )
        return Plan.of(proved, optimizer=self.optimizer, problem=self.problem, search=search)

    def explain(self, subject: str | None = None) -> str:
        """Return why the plan is as it is.

        Args:
          subject: an axis (``tensor``), a size of one (``tensor=8``), a dimension or a parameter; all of the
            plan if not given. A size of an axis that is searched for only where it is declared (``stage=8``)
            is priced now, if the plan was just made.

        Raises:
          UserError: `subject` is none of these.
        """
        return explain(with_asked(self, self.search, subject), subject)

    def compare(self, other: Plan) -> Comparison:
        """Return this plan (A) and `other` (B) side by side, for a terminal or a notebook."""
        return compare(self, other)

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


def plan(
    loss: Callable[..., Any],
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
    interleave: int | None = None,
    attention: str | Sequence[str] | None = None,
    segments: int | None = None,
    context: str | None = None,
    experts: str = "auto",
    gradients: str = "auto",
    names: Any = None,
    trainable: Any = None,
    state: Any = None,
    recognise: Sequence[str] = FORMS,
    accumulation: str = EXACT,
    max_passes: int = MAX_PASSES,
    calibration: str | os.PathLike[str] | None = None,
) -> Plan:
    """Return the plan for training ``loss(params, batch)`` on `topology` that is fastest and fits its memory.

    What is declared is kept, the rest is searched for. On simulated devices, whose links and memory are those
    of no real chip, the plan that stores least on a device comes first, and time decides among equals.

    >>> import jax
    >>> def loss(params, x):
    ...     return ((x @ params["w"]) ** 2).mean()
    >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), "float32")}
    >>> x = jax.ShapeDtypeStruct((512, 4096), "float32")
    >>> found = plan(loss, params, x, topology="v5e:2x4", mesh={"data": 2})
    >>> found.mesh["data"], found.estimate.step_seconds < 0.01
    (2, True)

    Args:
        loss: the unsharded function, to a scalar or ``(scalar, aux)``; it is traced, not run.
        params: a tree of arrays or ShapeDtypeStructs.
        batch: likewise, the global batch.
        topology: the devices, such as ``v5p:4x4x8``.
        optimizer: its moments must fit too; without one Adam's in float32 are assumed.
        mesh: sizes of some axes; -1 takes all that the others leave.
        rules: named dimension or path pattern → axes, as in `Rules`.
        remat: ``none``, ``dots`` or ``full``, or the values of layers that are kept (see
            `meshwright.sharding.program.layers`) → ``device`` or ``host``.
        microbatches: parts of the batch that are computed one after another.
        schedule: of declared pipeline stages: ``1f1b`` or ``gpipe``.
        interleave: chunks of layers that a declared stage holds: with v of them it waits 1/v as long.
        attention: the implementation of `meshwright.sharding.ops.attention`: ``xla``, or a kernel,
            ``splash``, ``cudnn`` or ``cudnn_packed``; ``auto``, the default, is the chip's own where it
            supports what is asked; of several the first that can is taken.
        segments: how many segments a row of the batch has at most, its padding counted as one, where those of
            one id lie next to each other. Kernels that read packed rows by their segments want it; a row that
            breaks it gives a loss that is not a number.
        context: how attention goes over the mesh axis of that name: ``gathered`` (every device gets all
            keys), ``heads`` (the sequence is traded for heads), ``ring`` (chunks of keys go round) or
            ``neighbours`` (those that a window reaches); the fastest that fits if not given.
        experts: what multiplies by `meshwright.sharding.ops.experts`: ``xla``, or a kernel, ``megablox`` or
            ``mosaic``; ``auto`` is the chip's own once it was compared there.
        gradients: ``auto``: GPUs take those of bfloat16 products by bfloat16 products, and sum a look-up's in
            float32; ``jax``: as JAX does.
        names: a tree like `params` of tuples of dimension names, for rules and for what is printed.
        trainable: which parameters are trained, all floats if not given: a pattern over paths or several
            (``"*lora*"``), patterns → bool, or a tree of bools like `params`. The others are kept in the
            state, with no gradient and nothing of the optimizer's, as integers and keys are.
        state: what changes beside the parameters (batch statistics, moving averages, counters, keys): a tree
            of arrays or ShapeDtypeStructs. The loss is then ``loss(params, batch, state)`` and returns
            ``(scalar, (aux, new state))``.
        recognise: which forms are worked through in one way however they are written: ``attention``,
            ``losses`` over a vocabulary, and ``layers`` without a scan, unless they are faster as they are
            written. `notes` says where.
        accumulation: what microbatches give: ``exact``, the whole batch's value and gradients, or ``by
            part``, the mean of the parts'.
        max_passes: with ``exact``, passes over the batch that microbatches may take: one, and one more for
            each sum over the examples that another waits for.
        calibration: file of `meshwright calibrate`, whose efficiencies price the plan in place of the shipped
            ones; the plan holds its digest.

    Raises:
        UserError: the declared parts contradict each other, the program or the topology, or nothing fits; or
            the loss does not come in `microbatches`.
    """
    declared = Declared(
        mesh={} if mesh is None else mesh,
        rules={} if rules is None else rules,
        remat=remat,
        microbatches=microbatches,
        schedule=schedule,
        interleave=interleave,
        attention=attention,
        segments=segments,
        context=context,
        experts=experts,
        gradients=gradients,
        accumulation=accumulation,
        max_passes=max_passes,
    )
    given = {"loss": loss, "params": params, "batch": batch, "optimizer": optimizer, "names": names}
    problem = problem_of(recognise, calibration, **given, trainable=trainable, state=state)
    found, search = best_of(problem, Topology.parse(topology), declared)
    return Plan.of(found, optimizer=optimizer, problem=search.problem, search=search)


def declare(
    loss: Callable[..., Any],
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
    interleave: int = 1,
    attention: str | Sequence[str] | None = None,
    segments: int | None = None,
    context: str | None = None,
    experts: str = "auto",
    gradients: str = "auto",
    trainable: Any = None,
    state: Any = None,
    recognise: Sequence[str] = FORMS,
    accumulation: str = EXACT,
    max_passes: int = MAX_PASSES,
    calibration: str | os.PathLike[str] | None = None,
) -> Plan:
    """Return the plan that the declared `mesh` and `rules` give for ``loss(params, batch)``.

    It is priced as the plans of `plan` are, and never refused because of its estimate: `notes` has a warning.

    >>> import jax
    >>> def loss(params, x):
    ...     return ((x @ params["w"]) ** 2).mean()
    >>> params = {"w": jax.ShapeDtypeStruct((512, 256), "float32")}
    >>> x = jax.ShapeDtypeStruct((64, 512), "float32")
    >>> mesh, names = {"fsdp": 4, "tensor": 2}, {"w": ("embed", "mlp")}
    >>> declare(loss, params, x, topology="h100:8", mesh=mesh, names=names).specs(params)
    {'w': P('fsdp', 'tensor')}

    Args:
        loss: the unsharded function; it is traced, not run.
        params: a tree of arrays or ShapeDtypeStructs.
        batch: likewise, the global batch; its arrays are ``[batch, ...]`` or ``[batch, sequence, ...]``.
        topology: the devices.
        mesh: axis → size, one of which may be -1.
        optimizer: its moments are part of the estimate; without one Adam's in float32 are assumed.
        rules: named dimension or path pattern → axes, over the defaults of `Rules.with_defaults`.
        names: a tree like `params` of tuples of dimension names.
        remat: what layers keep for their backward pass: a policy of `transform.remat`, or names → places.
        microbatches: parts of the batch that are computed one after another.
        interleave: chunks of layers that each stage of the mesh holds.
        attention: as in `plan`: ``auto`` if not given.
        segments: as in `plan`.
        context: as in `plan`.
        experts: as in `plan`.
        gradients: as in `plan`.
        trainable: which parameters are trained, as in `plan`.
        state: what changes beside the parameters, as in `plan`.
        recognise: as in `plan`: all if not given.
        accumulation: as in `plan`.
        max_passes: as in `plan`.
        calibration: as in `plan`.

    Raises:
        UserError: the mesh does not fit the topology, a rule cannot hold, the batch does not divide, or the
            loss does not come in `microbatches`.
    """
    given = {"loss": loss, "params": params, "batch": batch, "optimizer": optimizer, "names": names}
    problem = problem_of(recognise, calibration, **given, trainable=trainable, state=state)
    declared = Declared(
        mesh=mesh,
        rules={} if rules is None else rules,
        remat=remat,
        microbatches=microbatches,
        interleave=interleave,
        attention=attention,
        segments=segments,
        context=context,
        experts=experts,
        gradients=gradients,
        accumulation=accumulation,
        max_passes=max_passes,
    )
    made = declared_plan(problem, Topology.parse(topology), declared)
    return Plan.of(made, optimizer=optimizer, problem=problem)
