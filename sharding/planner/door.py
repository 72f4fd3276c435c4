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
from . import build, kernels
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

    @functools.cached_property
    def kernel_profiles(self) -> dict[bool, Profile]:
        """The program in tables, with its attention carried out by kernels, as they were asked for so far."""
        return {}

    def table(self, kernel: kernels.Chosen) -> Profile:
        """Return the program in tables, with its attention carried out by `kernel`."""
        if kernel.implementation is None:
            return self.profile
        kept = kernel.kept_by_name
        if kept not in self.kernel_profiles:
            self.kernel_profiles[kept] = profile(self.program, kernels=True, kept_by_name=kept)
        return self.kernel_profiles[kept]

    def kernel(self, topology: Topology, declared: Declared) -> kernels.Chosen:
        """Return the kernel of the program's attention."""
        return kernels.choose(self.program, topology, declared.attention)

    def space(self, topology: Topology, declared: Declared) -> Space:
        """Return what is worth considering."""
        table = self.table(self.kernel(topology, declared))
        if declared.remat is not None:
            check_names(read(declared.remat), table)
        return space(
            self.program,
            topology,
            declared,
            params=self.params,
            names=self.names,
            whole_batch=self.whole_batch,
            ladders=ladders(table, host=_has_host(topology)),
        )

    def pricer(self, topology: Topology, declared: Declared | None = None) -> Pricer:
        """Return what prices candidates, with attention by its kernel where they let it run."""
        slots = _ADAM_BYTES if self.optimizer is None else slot_bytes(self.optimizer, self.params)
        dtype = _product_dtype(self.program)

        @functools.cache
        def plain() -> Pricer:
            return Pricer(self.profile, topology, optimizer_slots=slots, dtype=dtype)

        kernel = self.kernel(topology, declared or Declared())
        if kernel.implementation is None:
            return plain()
        return Pricer(
            self.table(kernel),
            topology,
            optimizer_slots=slots,
            dtype=dtype,
            calibration=kernels.calibration(topology.chip.name, kernel),
            other=lambda candidate: None if kernel.can(candidate.dims) else plain(),
        )

    def solve(self, topology: Topology, declared: Declared, capacity_bytes: float | None = None) -> Answer:
        """Return the best that `topology` can do, in `capacity_bytes` a device if that is given."""
        program = self.program
        offered = self.space(topology, declared)
        pricer = self.pricer(topology, declared)
        capacity = capacity_bytes
        if capacity is None:
            capacity = topology.chip.usable_bytes * pricer.calibration.usable_memory
        sizes = build.parameter_bytes(program)
        elements = sum(math.prod(argument.shape) for argument in program.parameters)
        slots = pricer.slot_bytes * elements / max(sum(sizes.values()), 1)
        stored = stored_bytes(sizes, slots) if topology.chip.nominal else None
        found = search(offered, pricer.price, capacity, size=pricer.needed_bytes, stored=stored)
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
        kernel = self.problem.kernel(self.topology, self.declared)
        notes = build.notes_of(program, layout) + kernel.notes_on(layout.dims)
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
