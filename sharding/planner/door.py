"""`plan`: from a loss function, abstract arguments and a topology to a Plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..hardware.topology import Topology
from ..plans.record import Plan
from . import build
from .advice import nothing_fits
from .declared import Declared
from .inputs import ROOMS, Answer, Problem
from .search import Priced

if TYPE_CHECKING:
    import optax

_MISFITS_SHOWN = 3
# Said of a plan that fits only by less than the usual room.
_TIGHT = (
    "it fits only if the compiler leaves less memory free between arrays than it usually does: "
    "have it compiled (--verify) before it is booked"
)


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
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    declared = Declared(
        mesh=mesh or {},
        rules=rules or {},
        remat=remat,
        microbatches=microbatches,
        schedule=schedule,
        attention=attention,
    )
    problem = Problem(loss=loss, params=params, batch=batch, optimizer=optimizer, names=names)
    answer = problem.solve(topology, declared, rooms=ROOMS)
    best = answer.found.best
    if best is None:
        raise UserError(nothing_fits(problem, topology, declared, answer))
    return Search(problem=problem, topology=topology, declared=declared, answer=answer).plan(best)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What a plan came out of, for who asks further: the next best, or the best in less memory."""

    problem: Problem
    topology: Topology
    declared: Declared
    answer: Answer

    def plan(self, chosen: Priced) -> Plan:
        """Return `chosen`, one of what was found, as a Plan; all else that was found are its alternatives."""
        answer = self.answer
        program, layout = answer.program, chosen.candidate
        found = (answer.found.best, *answer.found.others, *answer.found.misfits[:_MISFITS_SHOWN])
        others = [one for one in found if one is not None and one is not chosen]
        kernel = self.problem.kernel(self.topology, self.declared)
        notes = build.notes_of(program, layout) + kernel.notes_on(layout.dims)
        if answer.room < 1.0 and chosen.fits:
            notes += (_TIGHT,)
        if self.problem.optimizer is None:
            notes += ("no optimizer was given: 8 bytes of moments for each parameter are assumed",)
        return build.plan_of(
            program,
            self.topology,
            layout,
            notes=notes,
            estimate=chosen.estimate,
            alternatives=build.alternatives_of(program, chosen, others, answer.capacity_bytes, answer.stored),
            refused=answer.space.refused,
            kernels=kernel.kernels if kernel.can(layout.dims) else {},
            optimizer=self.problem.optimizer,
            search=self,
        )

    def with_memory(self, share: float) -> Search:
        """Return the search again, with `share` of the memory that this one planned for."""
        capacity = self.answer.capacity_bytes * share
        rooms = tuple(room for room in ROOMS if room <= self.answer.room)
        answer = self.problem.solve(self.topology, self.declared, capacity, rooms)
        return dataclasses.replace(self, answer=answer)
