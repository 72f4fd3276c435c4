"""Whether a loss can go through stages, by the proof that its parts add up, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from ...errors import UserError, nearest_divisors
from ...plans.record import Decision
from ...plans.specs import axes_in, cut_into
from ...plans.vocabulary import DELAYED
from ...program.jaxpr import Traced
from ...program.program import Program
from ...program.tracing import read
from ..accumulation.proof import InParts, in_parts, refusal, rows_of
from ..accumulation.region import RowRegion, axes_of_rows, flat_specs, mixes, specs_of_rows
from ..accumulation.values import NotInParts
from ..experts import names_of_experts
from .layers import stacked_parameters, stacks_of
from .schedule import sharing
from .slots import STAGE, Slots
from .staged import Passes, Staged


class Pipelined(NamedTuple):
    """What a loss's run takes for stages: its region, the stages, and what was read of whole microbatches."""

    region: RowRegion
    staged: Staged
    of_whole: InParts


def pipelined(
    plan: Decision,
    mesh: Mesh | AbstractMesh,
    traced: Traced,
    passes: Passes,
    trained: Sequence[int],
    widens: bool,
    *,
    watched: bool = False,
) -> Pipelined:
    """Return how a traced loss goes through the stages of `plan` on `mesh`.

    `passes` gives the plan's passes over a program inside of the region, `trained` are the numbers of the
    parameters that may be trained. Layers that are `watched` run one at a time, for where a value is first
    not finite.

    Raises UserError, one sentence, if it cannot.
    """
    params, _, *state = traced.args
    stages = plan.mesh[STAGE]
    of_params, of_state = flat_specs(plan, params), flat_specs(plan, state[0], "state") if state else ()
    program = read(traced, state=(2,) if state else ())
    axes = _axes(plan, traced, program)
    manual = (*axes, STAGE)
    for spec in of_state:
        if mixes(spec, manual):
            raise UserError(
                f"stage={stages}: a part of the state is stored as {spec}, and beside stages an axis that "
                "cuts rows cuts no dimension that another axis cuts"
            )
    devices = cut_into(axes, plan.mesh)
    rows, needed = rows_of(traced), plan.microbatches * devices
    if rows % needed:
        near = nearest_divisors(rows // devices or 1, plan.microbatches)
        raise UserError(
            f"stage={stages} takes the rows of each device in microbatches: a batch of {rows} rows does not "
            f"divide by microbatches={plan.microbatches} x {devices} = {needed}; nearest: "
            f"{max(rows // needed, 1) * needed} rows, or microbatches={near}"
        )
    sharers = sharing(rows // needed, stages)
    try:
        whole = in_parts(traced, needed, by_block=True, prepares=False)
        shares = in_parts(traced, needed * sharers, by_block=True, prepares=False)
    except NotInParts as why:
        raise UserError(refusal(plan.microbatches, why, has_state=bool(state))) from None
    _check_passes(shares, stages)
    count = len(of_params)
    stacks = [
        Slots(
            layers=layers.eqn.params["length"],
            stages=stages,
            chunks=plan.interleave,
            stored={n: of_params[n] for n in stacked_parameters(program, layers, count)},
            manual=manual,
            watched=watched,
        )
        for layers in stacks_of(program, count, stages, plan.interleave)
    ]
    for slots in stacks:
        _check_storage(slots)
    region = RowRegion(
        mesh=mesh,
        axes=axes,
        lanes=(STAGE,),
        turns=sharers,
        params=of_params,
        reduced=flat_specs(plan, params, "moments"),
        state=of_state,
        read=shares,
    )
    staged = Staged(
        mesh=mesh,
        microbatches=plan.microbatches,
        sharers=sharers,
        stacks=stacks,
        passes=passes,
        params=params,
        state=tuple(state),
        trained=trained,
        widens=widens,
        delayed=plan.schedule == DELAYED,
        reruns=plan.stage_remat,
    )
    return Pipelined(region, staged, whole)


def _check_storage(slots: Slots) -> None:
    """Raise UserError if stages store stretches of layers and run others."""
    if slots.scattered and not all(map(slots.moves, slots.stored)):
        raise UserError(
            f"stage={slots.stages} with {slots.chunks} chunks of {slots.layers} layers runs other layers "
            "than each stage stores; leave the layers' dimension out of the rules for stage"
        )


def _axes(plan: Decision, traced: Traced, program: Program) -> tuple[str, ...]:
    """Return the axes that cut the rows. Raises UserError if they cut something else too, but for experts."""
    rows = specs_of_rows(plan, traced.args[1], rows_of(traced))
    axes = axes_of_rows(plan, rows, names_of_experts(plan, program))
    cut = {axis for spec in rows for axis in axes_in(spec[:1]) if plan.mesh[axis] > 1}
    if cut - set(axes):
        raise UserError(
            f"stage={plan.mesh[STAGE]}: {' and '.join(sorted(cut))} cut the rows of the batch and other "
            "dimensions that are computed with, which stages cannot yet"
        )
    return axes


def _check_passes(read: InParts, stages: int) -> None:
    """Raise UserError if gradients go back from sums over the batch to earlier ones, through the stages."""
    levels = read.levels
    if levels.backward:
        raise UserError(
            f"stage={stages}: the loss takes {max(levels.passes, 2)} passes over the batch, since sums over "
            "the examples wait for one another's gradients, and stages give gradients once"
        )
