"""What is known of a compiled step when its findings are looked for: the program, read once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..hardware.topology import Topology
from ..hlo.frames import nearest_line, user_line
from ..hlo.loops import Loop
from ..hlo.shapes import leaves, parse_shape
from ..hlo.text import Instruction, Program, SourceLine
from ..plans.record import Record
from .collectives import Site
from .flops import fusion_slices
from .memory import Memory
from .roofline import Work
from .timeline import Turn, item_of


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A collective with how often it runs in a step and how much of one run is exposed."""

    site: Site
    runs: float
    exposed: float
    source: SourceLine | None

    @property
    def seconds(self) -> float:
        """Of all runs, while the links are busy."""
        return self.site.seconds * self.runs

    @property
    def exposed_seconds(self) -> float:
        """Of all runs, what no computing runs beside."""
        return self.exposed * self.runs

    @property
    def item(self) -> str:
        """Its name in `Proof.time`."""
        return item_of(self.site)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A program, read: its loops, how often each computation runs, its collectives, its memory; and the plan.

    `planned` is None where the program was not compiled from a plan: then only what is wrong by itself is
    found.
    """

    program: Program
    topology: Topology
    mesh: Mapping[str, int]
    loops: Mapping[str, Loop]
    weights: Mapping[str, float]
    turns: Mapping[str, Turn]
    memory: Memory
    peak_bytes: float
    step_seconds: float
    planned: Record | None = None

    @functools.cached_property
    def collectives(self) -> tuple[Seen, ...]:
        """Every collective of the step, the costliest first."""
        found = [
            Seen(site=site, runs=runs, exposed=exposed, source=self._line(site))
            for computation, runs in self.weights.items()
            if computation in self.turns
            for site, exposed in self.turns[computation].sites
            if runs
        ]
        return tuple(sorted(found, key=lambda seen: -seen.seconds))

    def _line(self, site: Site) -> SourceLine | None:
        """Return who asked for a collective: itself, or what it was made of."""
        inner = user_line(self.program, self.program.instructions[site.inner])
        return inner or nearest_line(self.program, site.start)

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Instruction → those that read it."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.program.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return {name: tuple(users) for name, users in found.items()}

    def works(self, computation: str) -> Iterable[tuple[str, Work]]:
        """Return the instructions of a computation that compute, each with what it costs."""
        return self.turns[computation].works.items() if computation in self.turns else ()

    def hosts(self, computation: str) -> Iterable[tuple[str, float]]:
        """Return the instructions of a computation that move bytes to or from the host."""
        return self.turns[computation].hosts.items() if computation in self.turns else ()

    def share_read(self, name: str, depth: int = 6) -> float | None:
        """Return which part of an instruction's result is read, None where that cannot be told.

        What slices take of it, through views, tuples and fusions; 1 where anything reads it whole.
        """
        instruction = self.program.instructions[name]
        whole = sum(array.bytes for array in leaves(parse_shape(instruction.shape)))
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
            return sum(array.bytes for array in leaves(parse_shape(user.shape)))
        if user.opcode == "fusion":
            return fusion_slices(self.program, user, name)
        if user.opcode in ("bitcast", "copy", "get-tuple-element", "copy-start", "copy-done"):
            share = self.share_read(user.name, depth - 1)
            size = sum(array.bytes for array in leaves(parse_shape(user.shape))[:1])
            return None if share is None else share * min(size, whole)
        if user.opcode in ("tuple", "while"):
            return None
        return whole
