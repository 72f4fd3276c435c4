"""`plan`: from a loss function, abstract arguments and a topology to a Plan."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from ..cost.estimate import Pricer
from ..cost.profile import Profile, profile
from ..errors import UserError
from ..program.flops import work
from ..program.record import Program
from ..program.tracing import trace
from ..topology import Topology
from . import build
from .advice import nothing_fits
from .declared import Declared, names_of_data
from .microbatches import batch_rows, why_not, why_untraceable
from .plan import Plan
from .remats import check_names, ladders, read
from .search import Found, Priced, Stored, search, stored_bytes
from .space import Space, space

if TYPE_CHECKING:
    import optax

# Bytes of moments for each parameter element where no optimizer is given: Adam's two, in float32.
_ADAM_BYTES = 8.0
_MISFITS_SHOWN = 3


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
        names: a tree parallel to `params` of tuples of dimension names, for rules and for what is printed.

    Raises:
        UserError: the declared parts contradict each other, the program or the topology, or nothing fits.
    """
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    declared = Declared(
        mesh=mesh or {}, rules=rules or {}, remat=remat, microbatches=microbatches, schedule=schedule
    )
    problem = Problem(loss=loss, params=params, batch=batch, optimizer=optimizer, names=names)
    answer = problem.solve(topology, declared)
    best = answer.found.best
    if best is None:
        raise UserError(nothing_fits(problem, topology, declared, answer))
    return Search(problem=problem, topology=topology, declared=declared, answer=answer).plan(best)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A search and what it was over. `stored` is given where storage decides before time does."""

    program: Program
    space: Space
    found: Found
    capacity_bytes: float
    stored: Stored | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be planned, apart from where and with which parts declared."""

    loss: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    optimizer: Any
    names: Any

    @functools.cached_property
    def program(self) -> Program:
        """The traced loss, with the names of parameters and data."""
        names = {1: names_of_data(self.batch)} | ({} if self.names is None else {0: self.names})
        return trace(self.loss, self.params, self.batch, names=names)

    @functools.cached_property
    def whole_batch(self) -> str | None:
        """Why the batch cannot be worked through in parts; None if it can."""
        if reason := why_not(self.program):
            return reason
        return why_untraceable(self.loss, self.params, self.batch, batch_rows(self.program))

    @functools.cached_property
    def profile(self) -> Profile:
        """The program in tables."""
        return profile(self.program)

    def space(self, topology: Topology, declared: Declared) -> Space:
        """Return what is worth considering."""
        if declared.remat is not None:
            check_names(read(declared.remat), self.profile)
        return space(
            self.program,
            topology,
            declared,
            params=self.params,
            names=self.names,
            whole_batch=self.whole_batch,
            ladders=ladders(self.profile, host=_has_host(topology)),
        )

    def pricer(self, topology: Topology) -> Pricer:
        """Return what prices candidates."""
        slots = _ADAM_BYTES if self.optimizer is None else slot_bytes(self.optimizer, self.params)
        return Pricer(self.profile, topology, optimizer_slots=slots, dtype=_product_dtype(self.program))

    def solve(self, topology: Topology, declared: Declared, capacity_bytes: float | None = None) -> Answer:
        """Return the best that `topology` can do, in `capacity_bytes` a device if that is given."""
        program = self.program
        offered = self.space(topology, declared)
        pricer = self.pricer(topology)
        capacity = capacity_bytes
        if capacity is None:
            capacity = float(topology.chip.hbm_bytes or math.inf) * pricer.calibration.usable_memory
        sizes = build.parameter_bytes(program)
        elements = sum(math.prod(argument.shape) for argument in program.parameters)
        slots = pricer.slot_bytes * elements / max(sum(sizes.values()), 1)
        stored = stored_bytes(sizes, slots) if topology.chip.nominal else None
        found = search(offered, pricer.price, capacity, stored=stored)
        return Answer(program=program, space=offered, found=found, capacity_bytes=capacity, stored=stored)


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
        notes = build.notes_of(program, layout)
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
            optimizer=self.problem.optimizer,
            search=self,
        )

    def with_memory(self, share: float) -> Search:
        """Return the search again, with `share` of the memory that this one planned for."""
        answer = self.problem.solve(self.topology, self.declared, self.answer.capacity_bytes * share)
        return dataclasses.replace(self, answer=answer)


def _has_host(topology: Topology) -> bool:
    """Whether what a device keeps can be sent to its host: simulated devices share one memory with it."""
    return not topology.chip.nominal and topology.chip.host_link_bytes_per_second_per_chip is not None


def slot_bytes(optimizer: optax.GradientTransformation, params: Any) -> float:
    """Return the bytes of an optimizer's arrays for each element of the parameters."""
    state = jax.eval_shape(optimizer.init, params)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
    return total / max(sum(leaf.size for leaf in jax.tree.leaves(params)), 1)


def _product_dtype(program: Program) -> str:
    """Return the type of the operands of most matrix work; whatever is not bfloat16 counts as float32."""
    done: dict[str, float] = {}
    for equation in program.equations():
        one = work(equation)
        if one.unit == "matmul":
            dtype = str(getattr(equation.eqn.invars[0].aval, "dtype", "float32"))
            done[dtype] = done.get(dtype, 0.0) + one.flops * equation.multiplicity
    most = max(done, key=lambda dtype: done[dtype], default="float32")
    return "bfloat16" if most in ("bfloat16", "float16") else "float32"
