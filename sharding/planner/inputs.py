"""What is to be planned, and the search for it on a topology."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..cost.calibration import Calibration, calibration_for
from ..cost.candidate import Candidate
from ..cost.compute import FusedAttention
from ..cost.context import SpreadCall, calls_of
from ..cost.estimate import Pricer
from ..cost.execution import Execution, execution_for
from ..cost.findings import Findings
from ..cost.measured import Measurement
from ..cost.measured import load as load_measurement
from ..cost.pieces import Machine
from ..cost.profile import ProgramTables, profile
from ..errors import UserError, wrong
from ..hardware.memory import usable_bytes
from ..hardware.topology import Topology
from ..ops.grouped import TILES
from ..paths import by_path
from ..plans.arrays import check_new_state
from ..plans.trainable import split, trained_paths
from ..plans.vocabulary import BY_PART
from ..program.dims import batch_rows
from ..program.flops import work
from ..program.loss import abstract, checked
from ..program.program import Program
from ..program.recognise import FORMS, checked_forms
from ..program.tracing import trace
from ..program.untraceable import check_constants
from ..transform.accumulation.proof import InParts
from ..xla.compiler import compiler_of
from . import build
from .attending import AttentionPrices, Kind
from .choices import arithmetic, experts
from .choices import attention as kernels
from .choices.microbatches import PartsProof
from .choices.remat import check_names, ladders, read
from .declared import DATA_NAMES, Declared
from .search import Found, Priced, StoredBytes, anything_fits, search, stored_bytes
from .slots import OptimizerArrays
from .space import Space, Worth, space

# Bytes of moments for each parameter element where no optimizer is given: Adam's two, in float32.
_ADAM_BYTES = 8.0
# What an allocator leaves free between arrays counts; by half where nothing fits so, and then not at all.
ROOMS = (1.0, 0.5, 0.0)
# Times as fast that a plan is which may not fit, to be taken before one that will; and times a device's
# memory that it needs at most, with all of that room.
_WORTH_A_COMPILE, _NEARLY = 1.5, 1.15
# Times as fast that one is, to be told of, and compiled first where compiling is asked for.
_WORTH_A_TRY = 1.05

# Say what a table, or a way of running a step, would be under a supposition.
_OfTables = Callable[[ProgramTables], ProgramTables]
_OfExecution = Callable[[Execution], Execution]
# Give the Pricer for a candidate that another one is not for, None where that one is.
_Other = Callable[[Candidate], Pricer | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supposing:
    """A program other than it is, to price what that would win.

    tables, execution: give what takes the place of the program's tables and of how a step is run; dtype: of
    products, if not given the program's own; attention: the implementation, if not given the declared one.
    """

    tables: _OfTables = lambda tables: tables
    execution: _OfExecution = lambda execution: execution
    dtype: str | None = None
    attention: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A search and what it was over. `stored` is given where storage decides before time does.

    `room` is the share of what an allocator leaves free between arrays that was counted.
    """

    program: Program
    space: Space
    found: Found
    capacity_bytes: float
    stored: StoredBytes | None
    room: float

    def much_faster(self, than: Priced) -> bool:
        """Whether the best is so much faster that it is worth a compile to see whether it fits."""
        best = self.found.best
        return best is not None and _WORTH_A_COMPILE * best.estimate.step_seconds < than.estimate.step_seconds

    @property
    def is_short(self) -> bool:
        """Whether nothing fits, or what fits is much slower than what nearly does."""
        best = self.found.best
        return best is None or any(
            one.estimate.needed_bytes < _NEARLY * self.capacity_bytes
            and _WORTH_A_COMPILE * one.estimate.step_seconds < best.estimate.step_seconds
            for one in self.found.misfits
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be planned, apart from where and with which parts declared."""

    loss: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    optimizer: Any
    names: Any
    trainable: Any = None
    recognise: tuple[str, ...] = FORMS
    state: Any = None
    calibration: Measurement | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        """What the loss takes: parameters, batch and, where it has one, its state."""
        return (self.params, self.batch) if self.state is None else (self.params, self.batch, self.state)

    def __post_init__(self) -> None:
        if self.optimizer is not None and not all(hasattr(self.optimizer, one) for one in ("init", "update")):
            raise wrong("optimizer", self.optimizer, "is none of optax's, such as optax.adamw(1e-3)")
        if self.params is None:
            raise wrong(
                "params", None, "is no tree of arrays; give the model's, or jax.eval_shape(init, key)"
            )
        object.__setattr__(self, "params", abstract(self.params, "parameter"))
        object.__setattr__(self, "batch", abstract(self.batch, "batch array"))
        if self.state is not None:
            object.__setattr__(self, "state", abstract(self.state, "state array"))

    @functools.cached_property
    def trained(self) -> tuple[str, ...] | None:
        """The paths of the parameters that are trained, None where all floats are."""
        return trained_paths(self.params, self.trainable)

    @functools.cached_property
    def program(self) -> Program:
        """The traced loss, with the names of parameters and data."""
        found = trace(
            checked(self.loss),
            *self.args,
            names=None if self.names is None else {0: self.names},
            rows=DATA_NAMES,
            state=(2,),
            trained=self.trained,
            recognise=self.recognise,
        )
        check_constants(found.jaxpr)
        if batch_rows(found) == 0:
            raise UserError("the batch has no rows: its arrays are of size 0")
        if self.state is not None:
            check_new_state(by_path(self.state), found.results)
        return found

    def accumulation(self, declared: Declared) -> PartsProof:
        """Return what is proved of working the batch through in parts, each number when first asked for."""
        return PartsProof(
            program=self.program,
            args=self.args,
            by_part=declared.accumulation == BY_PART,
            max_passes=declared.max_passes,
            known=self.proved,
        )

    @functools.cached_property
    def proved(self) -> dict[int, InParts | UserError]:
        """What was proved so far, by the number of parts."""
        return {}

    @functools.cached_property
    def attention(self) -> tuple[SpreadCall, ...]:
        """The calls of attention, which may lie over ``context``."""
        return calls_of(self.program)

    @functools.cached_property
    def profile(self) -> ProgramTables:
        """The program in tables."""
        return profile(self.program)

    @functools.cached_property
    def kernel_profiles(self) -> dict[frozenset[int], ProgramTables]:
        """The program in tables, with calls of attention carried out by kernels, as asked for so far."""
        return {}

    def table(self, fused: frozenset[int]) -> ProgramTables:
        """Return the program in tables, with the calls of attention `fused` as one kernel each."""
        if not fused:
            return self.profile
        if fused not in self.kernel_profiles:
            self.kernel_profiles[fused] = profile(self.program, kernels=fused)
        return self.kernel_profiles[fused]

    def kernel(self, topology: Topology, declared: Declared) -> kernels.Chosen:
        """Return the kernel of the program's attention."""
        key = topology, str(declared.attention), declared.segments
        if key not in self._kernels:
            chosen = kernels.choose(self.program, topology, declared.attention, declared.segments)
            self._kernels[key] = chosen
        return self._kernels[key]

    @functools.cached_property
    def _product_dtype(self) -> str:
        """The type of the operands of most matrix work."""
        return _product_dtype(self.program)

    @functools.cached_property
    def _kernels(self) -> dict[object, kernels.Chosen]:
        """The kernels chosen so far."""
        return {}

    def space(self, topology: Topology, declared: Declared, worth: Worth | None = None) -> Space:
        """Return what is worth considering, of layouts only what is `worth` it where that is given."""
        table = self.table(self.kernel(topology, declared).calls)
        if declared.remat is not None:
            check_names(read(declared.remat), table)
        return space(
            self.program,
            topology,
            declared,
            params=self.params,
            names=self.names,
            proof=self.accumulation(declared),
            ladders=ladders(table, host=_has_host(topology)),
            worth=worth,
        )

    @functools.cached_property
    def findings(self) -> dict[object, Findings]:
        """What was found of placements so far, by all that a price depends on but free memory."""
        return {}

    def forget(self) -> None:
        """Forget what was found of placements, which is much, and for nothing once a search is done."""
        self.findings.clear()

    @functools.cached_property
    def attending(self) -> dict[object, AttentionPrices]:
        """Prices of attention found so far, by topology and what is declared of it."""
        return {}

    @functools.cached_property
    def optimizer_arrays(self) -> OptimizerArrays | None:
        """The arrays of the optimizer, None where none is given."""
        if self.optimizer is None:
            return None
        return OptimizerArrays(self.program, self.optimizer, split(self.params, self.trained).trained)

    def pricer(
        self,
        topology: Topology,
        declared: Declared | None = None,
        room: float = 1.0,
        supposing: Supposing | None = None,
    ) -> Pricer:
        """Return what prices candidates, with attention by its kernel where they let it run.

        `room` is the share to count of what an allocator leaves free.
        """
        arrays = self.optimizer_arrays
        supposed, in_parts = supposing or Supposing(), self.accumulation(declared or Declared())
        if supposed.attention is not None:
            declared = dataclasses.replace(declared or Declared(), attention=supposed.attention)
        dtype = supposed.dtype or self._product_dtype

        def priced_by(
            table: ProgramTables,
            record: Calibration,
            execution: Execution,
            other: _Other | None,
            known: Findings,
        ) -> Pricer:
            return Pricer(
                supposed.tables(table),
                topology,
                optimizer_slots=_ADAM_BYTES if arrays is None else arrays.slot_bytes,
                optimizer_bytes=None if arrays is None else arrays.sized(topology),
                dtype=dtype,
                calibration=dataclasses.replace(record, fragmentation=room * record.fragmentation),
                execution=supposed.execution(execution),
                more_passes=in_parts.more_passes,
                ahead=in_parts.ahead,
                other=other,
                calls=self.attention,
                attended=attending.seconds,
                known=known,
            )

        asked = declared or Declared()
        of_experts, _ = experts.choose(self.program, topology, asked.experts)
        grouped = of_experts.get("experts", {}).get("implementation", TILES)
        by_jax = arithmetic.as_jax(self.program, topology, asked.arithmetic)
        on_gpu = topology.chip.platform == "gpu"

        def execution(attention: FusedAttention | None = None) -> Execution:
            return dataclasses.replace(
                execution_for(topology, attention, grouped),
                wide_gradients="products" in by_jax,
                short_sums="lookups" in by_jax,
                wide_sums=on_gpu and "lookups" not in by_jax,
                pads_products=on_gpu and "multiple" not in by_jax,
            )

        kernel = self.kernel(topology, asked)
        efficiencies = calibration_for if self.calibration is None else self.calibration.record
        record = functools.partial(efficiencies, topology.chip.name)
        attended = str(asked.attention), asked.segments
        # What this Pricer finds is found for another share of the room too, and for other meshes.
        way = asked.accumulation, asked.max_passes, in_parts.ahead
        priced = (topology, *attended, asked.experts, asked.arithmetic, *way)
        shared = self.findings if supposed == Supposing() else {}
        machine = Machine(
            chip=topology.chip, calibration=record(), of_kernel=record(kernels.priced_as(kernel))
        )
        attending = self.attending.setdefault(
            (topology, *attended), AttentionPrices(calls=self.attention, kernel=kernel, machine=machine)
        )

        def pricer_of(fused: frozenset[int], by_kernel: frozenset[int], other: _Other | None) -> Pricer:
            attention = kernels.cost(kernel, self.program, by_kernel) if by_kernel else None
            if fused and attention is None:
                attention = FusedAttention()
            return priced_by(
                self.table(fused),
                record(kernels.priced_as(kernel)) if by_kernel else record(),
                execution(attention),
                other,
                shared.setdefault((*priced, fused, by_kernel), Findings()),
            )

        usual = (kernel.calls, kernel.calls)
        others: dict[Kind, Pricer] = {}

        def other(candidate: Candidate) -> Pricer | None:
            kind = attending.kind(candidate)
            if kind != usual and kind not in others:
                # Of its own kind alone: what knew of the others would be known by them in a circle, and all
                # that they have found left for the garbage collector.
                others[kind] = pricer_of(*kind, None)
            return others.get(kind)

        return pricer_of(*usual, other)

    def solve(
        self,
        topology: Topology,
        declared: Declared,
        capacity_bytes: float | None = None,
        rooms: Sequence[float] = ROOMS[:1],
    ) -> Answer:
        """Return the best that `topology` can do, in `capacity_bytes` a device if that is given.

        Of `rooms`, shares of what an allocator leaves free, the first counts that lets anything fit, or a
        later one that lets something much faster fit.
        """
        offered = self.space(topology, declared)
        answer = self._answer(topology, declared, offered, capacity_bytes, rooms[0])
        for room in rooms[1:]:
            if not answer.is_short:
                break
            tighter = self._answer(topology, declared, offered, capacity_bytes, room)
            if answer.found.best is None or tighter.much_faster(answer.found.best):
                answer = tighter
        return answer

    def nearly(self, topology: Topology, declared: Declared, answer: Answer) -> Answer | None:
        """Return `answer` with a faster plan as its best that fits without any room for free places.

        None where there is none, or the allocator leaves nothing free anyway.
        """
        best, room = answer.found.best, ROOMS[-1]
        counted = self.pricer(topology, declared, answer.room).calibration.fragmentation
        if best is None or not counted or topology.chip.nominal:
            return None
        pricer = self.pricer(topology, declared, room)
        found = search(
            answer.space,
            pricer.price,
            answer.capacity_bytes,
            size=pricer.needed_bytes,
            least=pricer.least,
            floor=pricer.least_bytes,
            runners_up=0,
            each_size=False,
            below=best.estimate.step_seconds / _WORTH_A_TRY,
        ).best
        if found is None:
            return None
        others = [best, *answer.found.others]
        misfits = [one for one in answer.found.misfits if one.candidate.mesh != found.candidate.mesh]
        told = dataclasses.replace(answer.found, best=found, others=tuple(others), misfits=tuple(misfits))
        return dataclasses.replace(answer, found=told, room=room)

    def fits(self, topology: Topology, declared: Declared) -> bool:
        """Whether anything fits `topology`, by all of what an allocator leaves free."""
        pricer = self.pricer(topology, declared, ROOMS[0])
        offered, capacity = self.space(topology, declared), capacity_of(topology, pricer)
        return anything_fits(offered, capacity, pricer.needed_bytes, pricer.least_bytes)

    def _answer(
        self, topology: Topology, declared: Declared, offered: Space, capacity: float | None, room: float
    ) -> Answer:
        sizes = build.parameter_bytes(self.program)
        pricer = self.pricer(topology, declared, room)
        if capacity is None:
            capacity = capacity_of(topology, pricer)
        moments = {
            argument.index: pricer.slot_bytes * math.prod(argument.shape) * argument.is_trained
            for argument in self.program.stored
        }
        stored = stored_bytes(sizes, moments) if topology.chip.nominal else None
        return Answer(
            program=self.program,
            space=offered,
            found=search(
                offered,
                pricer.price,
                capacity,
                size=pricer.needed_bytes,
                least=pricer.least,
                floor=pricer.least_bytes,
                stored=stored,
            ),
            capacity_bytes=capacity,
            stored=stored,
            room=room,
        )

    def notes(self, topology: Topology, layout: Candidate) -> tuple[str, ...]:
        """Say what was recognised, of which primitives nothing is known, and what was assumed of inputs.

        And which arrays of the optimizer lie whole under `layout` though they matter.
        """
        found = [*self.program.notes, *(one.note for one in self.program.unknown)]
        found += build.notes_of_captured(self.program, topology)
        if self.optimizer_arrays is not None:
            found += self.optimizer_arrays.notes(layout, topology)
        else:
            found.append(
                f"no optimizer was given: {_ADAM_BYTES:g} bytes of moments for each parameter are assumed"
            )
        if self.calibration is not None and self.calibration.jax not in ("", jax.__version__):
            found.append(
                f"the calibration was measured with JAX {self.calibration.jax}, and this is JAX "
                f"{jax.__version__}: `meshwright calibrate` measures anew"
            )
        return tuple(found)


def problem_of(recognise: Sequence[str], calibration: str | os.PathLike[str] | None, **given: Any) -> Problem:
    """Return what is to be planned, of what was `given` to `plan` or `declare`."""
    measured = None if calibration is None else load_measurement(calibration)
    return Problem(recognise=checked_forms(recognise), calibration=measured, **given)


def capacity_of(topology: Topology, pricer: Pricer) -> float:
    """Return the bytes of a device that a step may take, as far as it is planned for."""
    return usable_bytes(topology.chip) * pricer.calibration.usable_memory


def _has_host(topology: Topology) -> bool:
    """Whether sending what a device keeps to its host is worth considering.

    Simulated devices share one memory with it.
    """
    known = topology.chip.host_link_bytes_per_second_per_chip is not None
    return known and not compiler_of(topology).host_is_device


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
