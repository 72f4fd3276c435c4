"""Evidence of a compiled step, from which findings are made: its module, costs, collectives and memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..hlo.frames import nearest_line, user_line
from ..hlo.loops import WhileLoop
from ..hlo.shapes import leaves, parse_shape, total_bytes
from ..hlo.text import HloModule, Instruction, SourceLine
from ..plans.record import Record
from .collectives import ScheduledCollective
from .flops import fusion_slices
from .memory import Memory
from .roofline import InstructionCost
from .timeline import ComputationCost


@dataclass(frozen=True, kw_only=True)
class StepCollective:
    """A collective of a step: how often it runs, and how many seconds of one run are exposed."""

    collective: ScheduledCollective
    runs: float
    exposed: float
    source: SourceLine | None

    @property
    def seconds(self) -> float:
        """Seconds for which all runs together occupy their links."""
        return self.collective.seconds * self.runs

    @property
    def exposed_seconds(self) -> float:
        """Seconds of all runs together beside which nothing is computed."""
        return self.exposed * self.runs


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A compiled step, and the plan it was compiled from.

    Attributes:
      module: the program.
      loops: its while loops by the name of their instruction.
      run_counts: how often each computation runs in a step.
      costs: what one run of each computation costs.
      memory: of the schedule.
      peak_bytes: of a device's memory, by the compiler's own figure where it states one.
      step_seconds: of one step.
      planned: None where there is no plan; findings that compare with one are then left out.
    """

    module: HloModule
    loops: Mapping[str, WhileLoop]
    run_counts: Mapping[str, float]
    costs: Mapping[str, ComputationCost]
    memory: Memory
    peak_bytes: float
    step_seconds: float
    planned: Record | None = None

    @functools.cached_property
    def collectives(self) -> tuple[StepCollective, ...]:
        """Every collective of the step, the costliest first."""
        found = [
            StepCollective(collective=one, runs=runs, exposed=exposed, source=self._line(one))
            for computation, runs in self.run_counts.items()
            if computation in self.costs
            for one, exposed in self.costs[computation].collectives
            if runs
        ]
        return tuple(sorted(found, key=lambda seen: -seen.seconds))

    def _line(self, collective: ScheduledCollective) -> SourceLine | None:
        inner = user_line(self.module, self.module.instructions[collective.inner])
        return inner or nearest_line(self.module, collective.start)

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Instructions that read each instruction's result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.module.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return {name: tuple(users) for name, users in found.items()}

    def instruction_costs(self) -> Iterator[tuple[str, InstructionCost, float]]:
        """Yield the instructions that compute: name, cost of one run, runs in a step."""
        for computation, cost in self.costs.items():
            if runs := self.run_counts.get(computation):
                yield from ((name, one, runs) for name, one in cost.instructions.items())

    def host_transfers(self) -> Iterator[tuple[str, float]]:
        """Yield the instructions that move bytes to or from the host: name, bytes of all runs in a step."""
        for computation, cost in self.costs.items():
            if runs := self.run_counts.get(computation):
                yield from ((name, moved * runs) for name, moved in cost.host_bytes.items())

    def share_read(self, name: str, depth: int = 6) -> float | None:
        """Return the share of an instruction's result that is read, None where that is not known.

        It is what slices take, directly or through views and fusions (as many as `depth` in a row); 1 where
        an instruction reads all of it.
        """
        whole = total_bytes(parse_shape(self.module.instructions[name].shape))
        users = self.users.get(name, ())
        if not whole or not users or not depth:
            return None
        taken = 0.0
        for user in users:
            part = self._part(user, name, whole, depth)
            if part is None:
                return None
            taken += part
        return min(1.0, taken / whole)

    def _part(self, user: Instruction, name: str, whole: float, depth: int) -> float | None:
        if user.opcode in ("dynamic-slice", "slice") and user.operands[0] == name:
            return total_bytes(parse_shape(user.shape))
        if user.opcode == "fusion":
            return fusion_slices(self.module, user, name)
        if user.opcode in ("bitcast", "copy", "get-tuple-element", "copy-start", "copy-done"):
            share = self.share_read(user.name, depth - 1)
            size = sum(array.bytes for array in leaves(parse_shape(user.shape))[:1])
            return None if share is None else share * min(size, whole)
        if user.opcode in ("tuple", "while"):
            return None
        return whole
