"""When everything of a step runs: the schedule gone through once, loops multiplied.

Computing goes in the order of the schedule, one instruction after the other. A synchronous collective stops
it. An asynchronous one holds its links from its start (or from when those before it leave them) for as long
as the link model says; at its done the device waits for what is left. So do copies between HBM and the vector
memory and those to and from the host. What a wait comes to is exposed; everything else ran beside computing.
Loop bodies are gone through by themselves: what is open around a loop goes on beside it, while the loop's own
do not hold its links.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..cost.calibration import Calibration
from ..hardware.chip import Chip
from ..hlo.loops import Loop, branches, callees
from ..hlo.shapes import leaves, parse_shape
from ..hlo.text import Instruction, Program
from .collectives import Site, Sites
from .roofline import NOTHING, Work, host_bytes, to_host, work

#: Items of `Proof.time` that are no collectives.
COMPUTE, PREFETCH, HOST = "compute", "prefetch", "host"


@dataclass(kw_only=True)
class Turn:
    """One run of a computation: its seconds, of which `exposed` by item; they add up with what it calls.

    `sites` are its own collectives with their exposed seconds, `works` its own instructions' costs, `hosts`
    its own transfers to or from the host in bytes; `held` is how long it holds each link or lane.
    """

    seconds: float = 0.0
    items: dict[str, float] = field(default_factory=dict)
    sites: list[tuple[Site, float]] = field(default_factory=list)
    works: dict[str, Work] = field(default_factory=dict)
    hosts: dict[str, float] = field(default_factory=dict)
    held: dict[tuple[object, ...], float] = field(default_factory=dict)


def item_of(site: Site) -> str:
    """Return a collective's name in `Proof.time`: ``all_gather/fsdp``."""
    return f"{site.kind}/{'×'.join(site.axes) or 'none'}"


class Timeline:
    """Goes through the schedules of a program's computations, each once."""

    def __init__(
        self,
        program: Program,
        loops: Mapping[str, Loop],
        sites: Sites,
        chip: Chip,
        calibration: Calibration,
        bundles: Mapping[str, int] | None = None,
    ) -> None:
        self._program = program
        self._loops = loops
        self._sites = sites
        self._chip = chip
        self._calibration = calibration
        self._bundles = bundles or {}
        self.turns: dict[str, Turn] = {}

    def turn(self, computation: str) -> Turn:
        """Return one run of a computation."""
        if computation not in self.turns:
            self.turns[computation] = Turn()  # a computation that calls itself would end here
            self.turns[computation] = _Walk(self, computation).run()
        return self.turns[computation]

    def worst_branch(self, conditional: Instruction) -> str | None:
        """Return the branch that takes longest."""
        found = [name for name in branches(conditional) if name in self._program.computations]
        return max(found, key=lambda name: self.turn(name).seconds, default=None)


class _Walk:
    def __init__(self, timeline: Timeline, computation: str) -> None:
        self._line = timeline
        self._program = timeline._program
        self._computation = computation
        self._turn = Turn()
        self._now = 0.0
        # Link or lane → when it is free again, and the start that holds it until then.
        self._free: dict[tuple[object, ...], tuple[float, str]] = {}
        # Start → when it ends, of what has begun and not been waited for.
        self._open: dict[str, float] = {}
        self._links: dict[str, tuple[tuple[object, ...], ...]] = {}
        self._items: dict[str, str] = {}
        self._exposed: dict[str, float] = {}
        # Start → the start that held its links when it wanted to begin.
        self._before: dict[str, str] = {}

    def run(self) -> Turn:
        sites = self._line._sites.of(self._computation)
        starts = {site.start: site for site in sites}
        self._member = {site.end: site.start for site in sites if site.asynchronous}
        for name in self._program.computations[self._computation].instructions:
            instruction = self._program.instructions[name]
            if name in self._member:
                self._compute(instruction)
                self._wait(self._member[name])
                continue
            if name in starts:
                self._collective(starts[name], instruction)
                continue
            self._step(instruction)
        for name in list(self._open):
            self._wait(name)
        self._turn.seconds = self._now
        self._turn.sites = [(site, self._exposed.get(site.start, 0.0)) for site in sites]
        return self._turn

    def _step(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            loop = self._line._loops[instruction.name]
            turns = 1 if loop.turns is None else loop.turns
            self._call(loop.body, turns)
            self._call(loop.condition, turns + 1)
        elif opcode == "call":
            for callee in callees(instruction).values():
                self._call(callee, 1)
        elif opcode == "conditional":
            branch = self._line.worst_branch(instruction)
            if branch is not None:
                self._call(branch, 1)
        elif (moved := host_bytes(self._program, instruction)) > 0.0:
            self._host(instruction, moved)
        elif (
            opcode in ("copy-start", "slice-start", "dynamic-slice-start") and instruction.collective is None
        ):
            self._prefetch(instruction)
        elif opcode.endswith("-done"):
            self._wait(self._begin(instruction))
        else:
            self._compute(instruction)

    def _begin(self, done: Instruction) -> str:
        return self._line._sites._begin(done)

    def _call(self, computation: str, times: float) -> None:
        if computation not in self._program.computations or not times:
            return
        inner = self._line.turn(computation)
        for item, seconds in inner.items.items():
            self._turn.items[item] = self._turn.items.get(item, 0.0) + seconds * times
        for link, seconds in inner.held.items():
            self._turn.held[link] = self._turn.held.get(link, 0.0) + seconds * times
        self._put_off({link: seconds * times for link, seconds in inner.held.items()})
        self._now += inner.seconds * times

    def _put_off(self, held: Mapping[tuple[object, ...], float]) -> None:
        """Let what is open end later by the seconds for which others, that are called now, hold its links.

        So does what waits for one of these to leave its links.
        """
        late: dict[str, float] = {}
        for start, finish in self._open.items():
            taken = max((held.get(link, 0.0) for link in self._links[start]), default=0.0)
            late[start] = max(taken, late.get(self._before.get(start, ""), 0.0))
            if not late[start] or finish <= self._now:
                late[start] = 0.0
                continue
            self._open[start] = finish + late[start]
            for link in self._links[start]:
                if self._free[link][1] == start:
                    self._free[link] = (finish + late[start], start)

    def _spend(self, item: str, seconds: float) -> None:
        self._turn.items[item] = self._turn.items.get(item, 0.0) + seconds
        self._now += seconds

    def _compute(self, instruction: Instruction) -> None:
        line = self._line
        done = work(self._program, instruction, line._chip, line._calibration, line._bundles)
        if done is not NOTHING:
            self._turn.works[instruction.name] = done
            self._spend(COMPUTE, done.seconds)

    def _collective(self, site: Site, instruction: Instruction) -> None:
        self._compute(instruction)
        self._hold(site.start, item_of(site), site.seconds, site.resources)
        if not site.asynchronous:
            self._wait(site.start)

    def _hold(self, start: str, item: str, seconds: float, links: Iterable[tuple[object, ...]]) -> None:
        """Let an operation take its links when they are free."""
        begin = self._now
        self._links[start] = tuple(links)
        for link in self._links[start]:
            free, holder = self._free.get(link, (0.0, ""))
            if free > begin:
                begin, self._before[start] = free, holder
        finish = begin + seconds
        for link in self._links[start]:
            self._free[link] = (finish, start)
            self._turn.held[link] = self._turn.held.get(link, 0.0) + seconds
        self._open[start] = finish
        self._items[start] = item

    def _wait(self, start: str) -> None:
        """Wait for an operation's end; what held its links until it could begin is waited for first."""
        if start not in self._open:
            return
        finish = self._open.pop(start)
        holder = self._before.get(start)
        if holder is not None and holder in self._open:
            self._expose(holder, min(self._open[holder], finish))
        self._expose(start, finish)

    def _expose(self, start: str, until: float) -> None:
        waited = until - self._now
        if waited > 0.0:
            self._exposed[start] = self._exposed.get(start, 0.0) + waited
            self._spend(self._items[start], waited)

    def _move(self, instruction: Instruction, seconds: float, *lane: str) -> None:
        """Let a copy hold its lane, named for its item first; one that has no done stops the device."""
        self._hold(instruction.name, lane[0], seconds, [lane])
        if not instruction.opcode.endswith("-start") and instruction.opcode not in ("send", "recv"):
            self._wait(instruction.name)

    def _host(self, instruction: Instruction, moved: float) -> None:
        self._turn.hosts[instruction.name] = moved
        chip = self._line._chip
        rate = chip.host_link_bytes_per_second_per_chip
        way = "out" if to_host(self._program, instruction) else "in"
        self._move(instruction, moved * chip.devices_per_chip / rate if rate else 0.0, HOST, way)

    def _prefetch(self, instruction: Instruction) -> None:
        arrays = [array for array in leaves(parse_shape(instruction.shape)) if array.elements > 1]
        rate = self._line._chip.hbm_bytes_per_second
        moved = min((array.padded_bytes for array in arrays), default=0.0)
        self._move(instruction, moved / rate if rate else 0.0, PREFETCH)
