"""Efficiencies from a traced run: the operations of its own program beside what a record says of each."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator

from ...sharding import Plan
from ...sharding.compiled.flops import attention_kernel, flops, moved_bytes
from ...sharding.compiled.roofline import instruction_cost
from ...sharding.cost.calibration import Calibration, calibration_for
from ...sharding.cost.measured import Measurement
from ...sharding.errors import UserError
from ...sharding.hardware.chip import Chip
from ...sharding.hlo.text import HloModule, Instruction
from ...sharding.words import seconds
from ..profiling import profile_run
from ..profiling.profile import Operation
from ..profiling.program import load_program
from ..profiling.read import PLAN, PROFILE_FOLDER

# Of what a step takes, the least share of a kind of operation that tells of the kind.
_LEAST = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedKind:
    """Operations of one kind in a step: seconds as traced and by a record, and the field that they are by."""

    field: str
    traced: float
    recorded: float
    before: float

    @property
    def after(self) -> float:
        """The efficiency with which the record says what was traced."""
        return float(f"{self.before * self.recorded / self.traced:.4g}")

    def __str__(self) -> str:
        took, said = seconds(self.traced), seconds(self.recorded)
        change = f"{self.field} = {self.after:g} (before {self.before:g})"
        return f"{change}: {took} of a step, {said} by the record"


def refined(
    run: str | pathlib.Path, known: Callable[[str, str], Measurement | None] = lambda chip, version: None
) -> tuple[Measurement, list[TracedKind]]:
    """Return a measurement with the efficiencies that a run's newest trace tells, and how each was found.

    Products, attention and work that is as fast as memory are told by the program saved beside the trace,
    each as a whole; starts, sizes and links are left as they were.

    Args:
      run: folder of a run with a plan and a profile.
      known: gives what is refined by the names of the chip and of the JAX version; where it gives None, the
        chip's shipped record is.

    Raises:
      UserError: the run has no profile, plan or program, its steps are not known, or it ran on a TPU, whose
        program states its compiler's cycles.
    """
    run = pathlib.Path(run)
    profile = profile_run(run)
    saved = load_program(run / PROFILE_FOLDER)
    if saved is None or not (run / PLAN).is_file():
        raise UserError(f"{run} has no program and plan beside its trace, by which operations are told")
    if not profile.steps:
        raise UserError(f"the trace of {run} has no steps, so nothing of it is a step's time")
    plan = Plan.load(run / PLAN)
    chip = plan.topology.chip
    if chip.platform == "tpu":
        raise UserError(
            "a TPU's program states its compiler's cycles; a trace refines the record of GPUs and CPUs"
        )
    kernel = plan.kernels.get("attention", {}).get("implementation")
    measurement = known(chip.name, saved.jax)
    record = (
        calibration_for(chip.name, kernel) if measurement is None else measurement.record(chip.name, kernel)
    )
    found = list(compared(profile.operations, saved.program, chip, record))
    if not found:
        raise UserError(f"no operation in the trace of {run} is one of the program saved beside it")
    base = measurement or Measurement(chip=chip.name, jax=saved.jax)
    rows = [{"kind": "traced", **dataclasses.asdict(one)} for one in found]
    return dataclasses.replace(
        base,
        efficiencies={**base.efficiencies, **{one.field: one.after for one in found}},
        measured=(*base.measured, *rows),
    ), found


def compared(
    operations: Iterable[Operation], module: HloModule, chip: Chip, record: Calibration
) -> Iterator[TracedKind]:
    """Yield each kind of operation that takes part of a step, as traced and as `record` has it."""
    traced: dict[str, float] = {}
    recorded: dict[str, float] = {}
    for one in operations:
        instruction = module.instructions.get(one.name)
        if one.kind != "compute" or instruction is None:
            continue
        cost = instruction_cost(module, instruction, chip, record, {})
        field = _field(module, instruction, chip, record, cost.seconds)
        if field is not None and cost.seconds > 0.0:
            traced[field] = traced.get(field, 0.0) + one.seconds
            recorded[field] = recorded.get(field, 0.0) + cost.seconds * one.count
    total = sum(traced.values())
    for field, spent in traced.items():
        if spent > _LEAST * total:
            yield TracedKind(
                field=field, traced=spent, recorded=recorded[field], before=getattr(record, field)
            )


def _field(
    module: HloModule, instruction: Instruction, chip: Chip, record: Calibration, spent: float
) -> str | None:
    """Return the efficiency that an instruction's seconds are by: of attention, products or the memory."""
    if attention_kernel(module, instruction) is not None:
        return "attention_efficiency"
    rate = chip.hbm_bytes_per_second
    if rate is None:
        return "matmul_efficiency" if flops(module, instruction) else None
    moving = moved_bytes(module, instruction) / (rate * record.memory_efficiency)
    return "memory_efficiency" if spent <= moving else "matmul_efficiency"
