"""Public functions `plan` and `declare`: from a loss, shapes and devices to a Plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..hardware.topology import Topology
from ..planner.declared import Declared
from ..planner.inputs import problem_of
from ..planner.outcome import best_of, declared_plan
from ..plans.vocabulary import EXACT
from ..program.around import apart
from ..program.recognise import FORMS
from ..transform.accumulation.proof import MAX_PASSES
from .facade import Plan

if TYPE_CHECKING:
    import optax


@apart()
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
    stage_remat: bool | None = None,
    attention: str | Sequence[str] | None = None,
    segments: int | None = None,
    context: str | None = None,
    experts: str = "auto",
    arithmetic: str = "auto",
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
        schedule: of declared pipeline stages: ``1f1b``, ``delayed`` (that, with gradients of layers' weights
            put off: stages wait less, and hold more) or ``gpipe``.
        interleave: chunks of layers that a declared stage holds: with v of them it waits 1/v as long.
        stage_remat: whether a declared stage keeps its chunks' inputs alone and runs them again on the way
            back, or what `remat` keeps of their layers, in more memory; it runs them again if not given.
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
        arithmetic: ``auto``: GPUs take gradients of bfloat16 products into float32 by bfloat16 products and
            sum look-ups' in float32, odd vocabularies are padded; ``jax``: all is as JAX does it.
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
        stage_remat=stage_remat,
        attention=attention,
        segments=segments,
        context=context,
        experts=experts,
        arithmetic=arithmetic,
        accumulation=accumulation,
        max_passes=max_passes,
    )
    given = {"loss": loss, "params": params, "batch": batch, "optimizer": optimizer, "names": names}
    problem = problem_of(recognise, calibration, **given, trainable=trainable, state=state)
    found, search = best_of(problem, Topology.parse(topology), declared)
    return Plan.of(found, optimizer=optimizer, problem=search.problem, search=search)


@apart()
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
    schedule: str | None = None,
    interleave: int = 1,
    stage_remat: bool = True,
    attention: str | Sequence[str] | None = None,
    segments: int | None = None,
    context: str | None = None,
    experts: str = "auto",
    arithmetic: str = "auto",
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
        schedule: of the mesh's stages, as in `plan`: ``1f1b`` if not given.
        interleave: chunks of layers that each stage of the mesh holds.
        stage_remat: whether stages run their chunks again on the way back, as in `plan`.
        attention: as in `plan`: ``auto`` if not given.
        segments: as in `plan`.
        context: as in `plan`.
        experts: as in `plan`.
        arithmetic: as in `plan`.
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
        schedule=schedule,
        interleave=interleave,
        stage_remat=None if stage_remat is True else stage_remat,
        attention=attention,
        segments=segments,
        context=context,
        experts=experts,
        arithmetic=arithmetic,
        accumulation=accumulation,
        max_passes=max_passes,
    )
    made = declared_plan(problem, Topology.parse(topology), declared)
    return Plan.of(made, optimizer=optimizer, problem=problem)
