"""A planned loss: the user's own function, traced once, with a plan's passes over it in their order.

The passes are asked in this order about each equation, and hand on to the next: `Name` (values of layers that
are to be kept), `Constrain` (where arrays lie, and the kernels of attention), `Remat` (a checkpoint around
each layer). The last step differentiates, plainly or a part of the batch at a time (`accumulation`).
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..errors import UserError
from ..plans import arrays
from ..plans.record import Decision, check_runs
from ..plans.specs import Spec
from ..plans.trainable import Split, split
from ..plans.vocabulary import EXACT
from ..program.around import mesh_of_caller
from ..program.explicit import without_layouts
from ..program.jaxpr import Pass, Traced, Traces, rewritten
from ..program.layers import INPUT, layer_scans, marks_of
from ..program.loss import checked
from ..program.program import Program
from ..program.recognise import recognised
from ..program.tracing import read
from ..xla.compiler import compiler_of
from ..xla.gpu_targets import compute_capability
from ..xla.reduction import reduction_steps
from .accumulation.by_part import mean_of_parts
from .accumulation.differentiable import Loss, differentiable
from .accumulation.proof import InParts, proved
from .accumulation.region import region_of
from .accumulation.run import Planned, Run
from .accumulation.values import Kind
from .arithmetic import Arithmetic
from .attention import AttentionKernel
from .constrain import Constrain
from .experts import Multiplier
from .gather import ByHand, Scattering
from .meshes import automatic, explicit_axes, of_plan
from .pipeline.build import pipelined
from .pipeline.prepare import PreparedRun, prepared
from .pipeline.slots import slots_of
from .remat import Name, Remat
from .said import (
    OF_LOSS,
    check_laid_by_loss,
    lying_elsewhere,
    not_arrays,
    not_there,
    other_count,
    other_devices,
    positional,
    within_manual,
)


def passes_of(
    plan: Decision,
    program: Program,
    mesh: Mesh | AbstractMesh,
    params: Any,
    state: Any = None,
    *,
    learns: bool = True,
    by_hand: tuple[str, ...] = (),
    lies: Callable[[int, Spec], Spec] | None = None,
) -> list[Pass]:
    """Return the passes that carry `plan` out on `program`, in order; each keeps the program's values.

    `params` and `state` are its arguments, those that are stored. `learns` says whether gradients are taken,
    without which there is nothing to keep. The axes `by_hand` are manual where the program is run, and are
    those of `mesh` that cut rows. `lies` gives how a parameter lies there, of its number and how it is
    stored, where that differs.

    Raises UserError if `program` has not what the plan names: a kept value, or layers to rematerialise.
    """
    saved = plan.saved if learns else {}
    platform = _platform(plan, mesh)
    # A plan may run on simulated devices in place of its own, which another compiler compiles for.
    on_own_chips = platform == plan.topology.chip.platform
    steps = {} if by_hand else reduction_steps(plan.mesh, plan.topology, plan.compiler_options)
    if by_hand:
        mesh = jax.sharding.get_abstract_mesh()
    marks = marks_of(program, saved)
    settings = plan.kernels.get("attention")
    capability = compute_capability(plan.topology.chip)
    arithmetic = plan.kernels.get("arithmetic", {})
    kernel = None
    if settings is not None or plan.context is not None:
        kernel = AttentionKernel(mesh, settings, platform, program, marks, capability, plan.context)
    planned = arrays.axes_of_dims(plan, program)
    around = {dim: tuple(axis for axis in axes if axis in by_hand) for dim, axes in planned.items()}
    axes = {dim: tuple(axis for axis in axes if axis not in by_hand) for dim, axes in planned.items()}
    stored, reduced = _lying(plan, params, state, lies)
    passes: list[Pass] = []
    if saved:
        passes.append(Name(marks, inputs=INPUT in saved, kernel=kernel))
    passes.append(
        Constrain(
            program,
            mesh,
            axes,
            stored=stored,
            reduced=reduced,
            scattering=Scattering(mesh, steps),
            kernel=kernel,
            unsaid=arrays.unsaid_dims(plan, program, axes),
            reduces_cast=on_own_chips and compiler_of(plan.topology).reduces_cast,
            by_hand=ByHand(mesh=mesh, axes=by_hand, widens=bool(by_hand) and platform == "cpu"),
            multiplier=Multiplier.of(plan.kernels.get("experts"), platform, marks),
            sums_wide="lookups" in arithmetic,
            on_cpu=platform == "cpu",
            around=around,
        )
    )
    if learns and plan.remat != "none":
        passes.append(Remat(program, plan.remat, plan.saved))
    if learns and arithmetic:
        passes.append(Arithmetic(arithmetic, math.prod(plan.mesh.values())))
    return passes


def _lying(
    plan: Decision, params: Any, state: Any, lies: Callable[[int, Spec], Spec] | None
) -> tuple[list[Any], list[Any]]:
    """Return how parameters and state are stored, and how their gradients are; `lies` as in `passes_of`."""
    both = _flat(arrays.specs(plan, params)), _flat(arrays.specs_of_moments(plan, params))
    if lies is not None:
        both = tuple([PartitionSpec(*lies(n, tuple(spec))) for n, spec in enumerate(one)] for one in both)
    of_state = [] if state is None else _flat(arrays.specs(plan, state, "state"))
    return both[0] + of_state, both[1] + of_state


def composed(
    traces: Traces,
    passes: Callable[..., Sequence[Pass]],
    *,
    state: Sequence[int] = (2,),
    stored: Mapping[int, Any] | None = None,
) -> Callable[..., Any]:
    """Return the function that was traced, of (params, batch) or (params, batch, state), with passes over it.

    `passes` gives them for its program, parameters and, where it has one, state; `state` says which argument
    that is. `stored` has the shapes of arguments of which a device has but its part when it is called.
    """
    whole = stored or {}

    programs: weakref.WeakKeyDictionary[Traced, Program] = weakref.WeakKeyDictionary()

    def function(*args: Any) -> Any:
        params, *others = (whole.get(place, one) for place, one in enumerate(args))
        traced = traces.on(params, *others)
        if traced not in programs:
            programs[traced] = read(traced, state=state)
        program = programs[traced]
        held = [others[place - 1] for place in state if place <= len(others)]
        outputs = rewritten(program, passes(program, params, *held), jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(traced.result), outputs)

    return function


def with_gradients(loss: Loss, params: Split, batch: Any, *state: Any) -> tuple[Any, Any]:
    """Return what `loss` gives, a scalar or ``(scalar, …)``, and the scalar's gradients.

    The gradients are those of the parameters that are trained, in a tree with None for the others.
    """

    def twice(trained: Any) -> tuple[Any, Any]:
        found = loss(params.joined(trained), batch, *state)
        return (found[0] if isinstance(found, tuple) else found), found

    gradients, found = jax.grad(twice, has_aux=True)(params.trained)
    return found, gradients


class PlannedLoss:
    """`loss(params, batch)` worked through as `plan` says on `mesh`; `traces` are those of `loss`.

    Where the plan has a state, it is `loss(params, batch, state)`, which gives ``(scalar, (aux, state))``.
    """

    def __init__(self, plan: Decision, loss: Loss, mesh: Mesh | AbstractMesh) -> None:
        check_runs(plan)
        mesh = of_plan(plan, mesh)
        self._plan, self._mesh = plan, mesh
        self._microbatches, self._trainable = plan.microbatches, plan.trainable
        self._staged = plan.mesh.get("stage", 1) > 1
        self._runs: weakref.WeakKeyDictionary[Traced, Run | PreparedRun] = weakref.WeakKeyDictionary()

        set_by_caller = mesh_of_caller()

        def rewrite(traced: Traced) -> Traced:
            own = check_laid_by_loss(without_layouts(traced, set_by_caller), mesh)
            return recognised(own, plan.recognise)

        self.traces = Traces(checked(loss), rewrite, set_by_caller)
        self._part = composed(self.traces, functools.partial(_passes, plan, mesh))

    def value(self, params: Any, batch: Any, *state: Any) -> Any:
        """Return what `loss` gives: a scalar, or ``(scalar, …)``."""
        if self._microbatches == 1 and not self._staged:
            return self._part(params, batch, *state)
        if self._plan.accumulation == EXACT:
            return self._run(params, batch, *state).value(params, batch, *state)
        return mean_of_parts(
            lambda part: (self._part(params, part), None),
            batch,
            self._microbatches,
            lambda part: (self.traces.on(params, part).result, None),
        )[0]

    def split(self, params: Any) -> Split:
        """Return `params` taken apart into those that are trained and the others."""
        return split(params, self._trainable)

    def as_stored(self, changes: Any) -> Any:
        """Return what is added to parameters laid as those are, where moments lie over more devices.

        XLA adds first and gathers the sums, for which a compiler with `gathers_copy` holds the parameters
        once more.
        """
        plan = self._plan
        if not plan.moments or not compiler_of(plan.topology).gathers_copy:
            return changes

        def lay(change: Any, spec: PartitionSpec, of_moments: PartitionSpec) -> Any:
            if spec == of_moments:
                return change
            return jax.lax.with_sharding_constraint(change, NamedSharding(self._mesh, spec))

        return jax.tree.map(lay, changes, arrays.specs(plan, changes), arrays.specs_of_moments(plan, changes))

    def value_and_grad(
        self,
        params: Any,
        batch: Any,
        *state: Any,
        of_floats: bool = False,
        cotangent: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Return what `loss` gives, and the gradients of the scalar with respect to the trained of `params`.

        A part's gradients are taken before the next part is begun, so that the activations of one part only
        are ever held. The gradients are a tree like `params` with None for those that are not trained; with
        `of_floats` those of all floats are taken, with a `cotangent` those of the scalar times that, of a
        loss that is not `is_even`.
        """
        parts = split(params, None) if of_floats else self.split(params)
        if self._microbatches == 1 and not self._staged:
            return with_gradients(self._part, parts, batch, *state)
        if self._plan.accumulation == EXACT:
            run = self._run(params, batch, *state)
            return run.value_and_grad(parts.places, params, batch, *state, cotangent=cotangent)
        return mean_of_parts(
            lambda part: with_gradients(self._part, parts, part),
            batch,
            self._microbatches,
            lambda part: (self.traces.on(params, part).result, parts.trained),
        )

    def is_even(self, *args: Any) -> bool:
        """Whether the gradient of a multiple of the loss is that multiple of its gradient, in parts."""
        return self._plan.accumulation != EXACT or self._run(*args).is_even

    def first_not_finite(self, params: Any, batch: Any, *state: Any) -> Any:
        """Return the number of where a value is first not finite, int32, see `pipeline.watch.Numbering`.

        The plan has a ``stage`` axis, of one device at least. Raises UserError for a loss that does not go
        through stages.
        """
        run = self._through_stages(self.traces.on(params, batch, *state), watched=True)
        return run.first_not_finite(self.split(params).places, params, batch, *state)

    def _run(self, *args: Any) -> Run | PreparedRun:
        """Return what works the batch through in parts, as it is proved of the whole batch's program."""
        traced = self.traces.on(*args)
        if traced not in self._runs:
            if self._staged:
                self._runs[traced] = self._through_stages(traced)
                return self._runs[traced]
            read = proved(traced, self._microbatches, trained=self.split(args[0]).places)
            region = region_of(self._plan, self._mesh, traced, read)
            if region is None:
                laid = self._laid(args[1], read) if read.moves_rows or read.prepared else None
                run = Run(read, self._planned(self._plan), self._part, laid=laid)
            else:
                planned = self._planned(self._plan, region.axes, _stored(traced))
                run = Run(region.read, planned, self._part, region)
            self._runs[traced] = run
        return self._runs[traced]

    def _laid(self, batch: Any, read: InParts) -> list[NamedSharding]:
        """Return how ``[parts, rows, ...]`` of each array of a batch lie, and of what is prepared of it.

        Each device has rows of all parts.
        """
        specs = [tuple(spec) for spec in _flat(arrays.specs(self._plan, batch, "batch"))]
        leads = [spec[:1] for spec, one in zip(specs, read.batch, strict=True) if one.kind is Kind.EXAMPLES]
        specs += [leads[0] if leads else ()] * len(read.prepared)
        return [NamedSharding(self._mesh, PartitionSpec(None, *spec)) for spec in specs]

    def _through_stages(self, traced: Traced, *, watched: bool = False) -> PreparedRun:
        ready = prepared(self._plan, self._mesh, traced)
        plan, traced = ready.plan, ready.traced

        def passes(program: Program, params: Any, *state: Any, learns: bool) -> list[Pass]:
            return passes_of(
                plan,
                program,
                self._mesh,
                params,
                *state,
                learns=learns,
                by_hand=found.region.manual,
                lies=lambda number, spec: slots_of(found.staged.stacks, number).lies(number, spec),
            )

        params = enumerate(jax.tree.leaves(traced.args[0]))
        trained = [n for n, one in params if jnp.issubdtype(one.dtype, jnp.inexact)]
        widens = _platform(plan, self._mesh) == "cpu"
        found = pipelined(plan, self._mesh, traced, passes, trained, widens, watched=watched)
        planned = self._planned(plan, found.region.manual, _stored(traced))
        whole = composed(Traces(ready.loss), functools.partial(_passes, plan, self._mesh))
        run = Run(found.region.read, planned, whole, found.region, found.staged, found.of_whole)
        return PreparedRun(ready, run)

    def _planned(
        self, plan: Decision, by_hand: tuple[str, ...] = (), stored: Mapping[int, Any] | None = None
    ) -> Planned:
        """Return what lays the plan's passes over a function of a part, in a region with axes `by_hand`."""

        def planned(function: Callable[..., Any], learns: bool) -> Callable[..., Any]:
            def passes(program: Program, params: Any, *state: Any) -> list[Pass]:
                # A part of the loss may have none of its layers.
                has_layers = learns and any(layer_scans(program.scope))
                return passes_of(
                    plan, program, self._mesh, params, *state, learns=has_layers, by_hand=by_hand
                )

            state = () if plan.state is None else (2,)
            return composed(Traces(function), passes, state=state, stored=stored)

        return planned


def apply(plan: Decision, loss: Loss, mesh: Mesh | AbstractMesh) -> Loss:
    """Return `loss(params, batch)` worked through as planned on `mesh`: same signature, same values.

    JAX differentiates it as any function; where the batch is worked through in parts, with respect to the
    parameters only.
    """
    planned = PlannedLoss(plan, loss, mesh)
    count = 2 if plan.state is None else 3
    one = planned.value
    if plan.microbatches > 1 or plan.mesh.get("stage", 1) > 1:
        gradients = functools.partial(planned.value_and_grad, of_floats=True)
        one = differentiable(planned.value, gradients, planned.is_even)

    @functools.wraps(loss)
    def function(*args: Any, **named: Any) -> Any:
        if axes := explicit_axes():
            raise UserError(
                f"plan.apply is called under a mesh whose axes {', '.join(axes)} are explicit; set "
                "plan.make_mesh() in its place, or jax.make_mesh(…, axis_types=(AxisType.Auto, …))"
            )
        args = (*positional(loss, args, named),)
        names = OF_LOSS[:count]
        wrong = within_manual() or other_count("the planned loss", args, names, count)
        if said := wrong or not_arrays(args, names) or not_there(args, names):
            raise UserError(said)
        try:
            with automatic(mesh):
                return one(*args)
        except UserError as error:
            # What the loss fails of may be arrays that it was not planned for.
            said = None if error.__cause__ is None else _other_arrays(plan, args)
            if said is None:
                raise
        except Exception as error:
            said = _why(plan, mesh, args, error)
            if said is None:
                raise
        raise UserError(said)

    return function


def _why(plan: Decision, mesh: Any, args: Sequence[Any], error: Exception) -> str | None:
    """Return what a caller of a planned loss did wrong that it raised `error`, None if that is not known."""
    if isinstance(error, TypeError) and "forward-mode" in str(error):
        return (
            "what plan.apply gives is differentiated by reverse only (jax.grad, jax.vjp, and these of one "
            "another): take jax.jacrev for jax.jvp or jax.jacfwd, or differentiate the loss itself"
        )
    return other_devices(mesh) or lying_elsewhere(args, OF_LOSS, mesh) or _other_arrays(plan, args)


def _other_arrays(plan: Decision, args: Sequence[Any]) -> str | None:
    """Return how the arguments of a planned loss differ from the plan's, None if they do not."""
    try:
        for kind, tree in zip(("parameter", "batch array", "state array"), args, strict=False):
            arrays.check_arrays(plan, kind, tree)
    except UserError as wrong:
        return str(wrong)
    return None


def _passes(
    plan: Decision, mesh: Mesh | AbstractMesh, program: Program, params: Any, *state: Any
) -> list[Pass]:
    return passes_of(plan, program, mesh, params, *state)


def _stored(traced: Traced) -> dict[int, Any]:
    """Return the arguments of a traced loss that are stored, by their places."""
    return {0: traced.args[0], **dict(enumerate(traced.args[2:], 2))}


def _flat(specs: Any) -> list[Any]:
    return jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def _platform(plan: Decision, mesh: Mesh | AbstractMesh) -> str:
    """Return what is compiled for: what the mesh's devices are, or those described if it has none."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    return plan.topology.chip.platform
