"""Seconds of a compiled step over its schedule: what computes, what is waited for.

Instructions that compute run one after the other, in the order of the schedule. A synchronous collective
stops the device. An asynchronous one occupies its links from its start (or from when an earlier one releases
them) for as long as the link model says; at its done the device waits for what is left of it. Copies between
HBM and vector memory, and those to and from the host, are treated alike. The time waited is exposed; all the
rest runs beside computing. The body of a loop is timed once, by itself: what is in flight around the loop
goes on beside it, later by as much as the loop's own operations occupy its links.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..cost.calibration import Calibration
from ..hardware.chip import Chip
from ..hlo.loops import WhileLoop, branches, callees
from ..hlo.shapes import leaves, parse_shape
from ..hlo.text import HloModule, Instruction
from .collectives import CollectiveFinder, ScheduledCollective
from .flops import flops, moved_bytes
from .roofline import NO_COST, InstructionCost, host_bytes, instruction_cost, to_host

#: Items of `Proof.time` that are no collectives.
COMPUTE, PREFETCH, COPIES, HOST = "compute", "prefetch", "copies", "host"

# A torus axis and direction, a network, or a lane of copies: what one operation at a time can occupy.
_Link = tuple[object, ...]


@dataclass(kw_only=True)
class ComputationCost:
    """One run of a computation, with all that it calls.

    `seconds` is the sum of `items`, seconds by item of `Proof.time`; `link_seconds` is how long it occupies
    each link. The others are of its own instructions alone: `collectives`, each with its exposed seconds,
    the costs of `instructions`, and `host_bytes` of those that move data to or from the host.
    """

    seconds: float = 0.0
    items: dict[str, float] = field(default_factory=dict)
    link_seconds: dict[_Link, float] = field(default_factory=dict)
    collectives: list[tuple[ScheduledCollective, float]] = field(default_factory=list)
    instructions: dict[str, InstructionCost] = field(default_factory=dict)
    host_bytes: dict[str, float] = field(default_factory=dict)


def item_of(collective: ScheduledCollective) -> str:
    """Return a collective's name in `Proof.time`: ``all_gather/fsdp``."""
    return f"{collective.kind}/{'×'.join(collective.axes) or 'none'}"


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Costs of a module's computations, each found once.

    Attributes:
      module: the program.
      loops: its loops by the name of their instruction.
      finder: of its collectives.
      chip: what a device is.
      calibration: efficiencies of the chip.
      bundles: instruction → length of its schedule, where that is known.
      kernels: kernel of attention → efficiencies with it, of those that have their own.
      costs: what was found so far, by computation.
    """

    module: HloModule
    loops: Mapping[str, WhileLoop]
    finder: CollectiveFinder
    chip: Chip
    calibration: Calibration
    bundles: Mapping[str, int]
    kernels: Mapping[str, Calibration] = field(default_factory=dict)
    costs: dict[str, ComputationCost] = field(default_factory=dict)

    def cost(self, computation: str) -> ComputationCost:
        """Return the cost of one run of a computation."""
        if computation not in self.costs:
            self.costs[computation] = ComputationCost()  # ends the recursion if it calls itself
            self.costs[computation] = _Schedule(self, computation).run()
        return self.costs[computation]

    def slowest_branch(self, conditional: Instruction) -> str | None:
        """Return the computation of a conditional's branches that takes longest."""
        found = [name for name in branches(conditional) if name in self.module.computations]
        return max(found, key=lambda name: self.cost(name).seconds, default=None)


class _Schedule:
    """The schedule of one computation, timed; operations in flight are known by the name of their start."""

    def __init__(self, timeline: Timeline, computation: str) -> None:
        self._timeline = timeline
        self._computation = computation
        self._cost = ComputationCost()
        self._now = 0.0
        # When each link is free again, and the operation that occupies it until then.
        self._free: dict[_Link, tuple[float, str]] = {}
        # When each operation ends that has begun and was not waited for.
        self._in_flight: dict[str, float] = {}
        self._links: dict[str, tuple[_Link, ...]] = {}
        self._items: dict[str, str] = {}
        self._exposed: dict[str, float] = {}
        # The operation that occupied an operation's links when that was to begin.
        self._before: dict[str, str] = {}

    def run(self) -> ComputationCost:
        module = self._timeline.module
        collectives = self._timeline.finder.of(self._computation)
        starts = {collective.start: collective for collective in collectives}
        ends = {collective.end: collective.start for collective in collectives if collective.asynchronous}
        for name in module.computations[self._computation].instructions:
            instruction = module.instructions[name]
            if name in ends:
                self._compute(instruction)
                self._wait(ends[name])
            elif name in starts:
                self._communicate(starts[name], instruction)
            else:
                self._step(instruction)
        for name in list(self._in_flight):
            self._wait(name)
        self._cost.seconds = self._now
        self._cost.collectives = [(one, self._exposed.get(one.start, 0.0)) for one in collectives]
        return self._cost

    def _step(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            loop = self._timeline.loops[instruction.name]
            trips = 1 if loop.trip_count is None else loop.trip_count
            self._call(loop.body, trips)
            self._call(loop.condition, trips + 1)
            if loop.told and trips and self._timeline.chip.platform == "gpu":
                self._spend(COMPUTE, trips * self._timeline.calibration.turn_seconds)
        elif opcode == "call":
            for callee in callees(instruction).values():
                self._call(callee, 1)
        elif opcode == "conditional":
            branch = self._timeline.slowest_branch(instruction)
            if branch is not None:
                self._call(branch, 1)
        elif (moved := host_bytes(self._timeline.module, instruction)) > 0.0:
            self._transfer(instruction, moved)
        elif (
            opcode in ("copy-start", "slice-start", "dynamic-slice-start") and instruction.collective is None
        ):
            self._prefetch(instruction)
        elif opcode == "fusion-start" and not flops(self._timeline.module, instruction):
            self._copy_slice(instruction)
        elif opcode.endswith("-done"):
            self._wait(self._timeline.finder.start_of(instruction))
        else:
            self._compute(instruction)

    def _call(self, computation: str, times: float) -> None:
        if computation not in self._timeline.module.computations or not times:
            return
        inner = self._timeline.cost(computation)
        for item, seconds in inner.items.items():
            self._cost.items[item] = self._cost.items.get(item, 0.0) + seconds * times
        occupied = {link: seconds * times for link, seconds in inner.link_seconds.items()}
        for link, seconds in occupied.items():
            self._cost.link_seconds[link] = self._cost.link_seconds.get(link, 0.0) + seconds
        self._delay(occupied)
        self._now += inner.seconds * times

    def _delay(self, occupied: Mapping[_Link, float]) -> None:
        """Let what is in flight end later by the seconds for which a called computation occupies its links.

        So does what waits for one of these to release its links.
        """
        late: dict[str, float] = {}
        for start, finish in self._in_flight.items():
            taken = max((occupied.get(link, 0.0) for link in self._links[start]), default=0.0)
            late[start] = max(taken, late.get(self._before.get(start, ""), 0.0))
            if not late[start] or finish <= self._now:
                late[start] = 0.0
                continue
            self._in_flight[start] = finish + late[start]
            for link in self._links[start]:
                if self._free[link][1] == start:
                    self._free[link] = (finish + late[start], start)

    def _spend(self, item: str, seconds: float) -> None:
        self._cost.items[item] = self._cost.items.get(item, 0.0) + seconds
        self._now += seconds

    def _compute(self, instruction: Instruction) -> None:
        line = self._timeline
        cost = instruction_cost(
            line.module, instruction, line.chip, line.calibration, line.bundles, line.kernels
        )
        if cost is not NO_COST:
            self._cost.instructions[instruction.name] = cost
            self._spend(COMPUTE, cost.seconds)

    def _communicate(self, collective: ScheduledCollective, instruction: Instruction) -> None:
        self._compute(instruction)
        self._begin(collective.start, item_of(collective), collective.seconds, collective.resources)
        if not collective.asynchronous:
            self._wait(collective.start)

    def _begin(self, start: str, item: str, seconds: float, links: Iterable[_Link]) -> None:
        """Begin an operation when its links are free."""
        begin = self._now
        self._links[start] = tuple(links)
        for link in self._links[start]:
            free, holder = self._free.get(link, (0.0, ""))
            if free > begin:
                begin, self._before[start] = free, holder
        finish = begin + seconds
        for link in self._links[start]:
            self._free[link] = (finish, start)
            self._cost.link_seconds[link] = self._cost.link_seconds.get(link, 0.0) + seconds
        self._in_flight[start] = finish
        self._items[start] = item

    def _wait(self, start: str) -> None:
        """Wait for an operation's end; waiting until it could begin counts for what occupied its links."""
        if start not in self._in_flight:
            return
        finish = self._in_flight.pop(start)
        holder = self._before.get(start)
        if holder is not None and holder in self._in_flight:
            self._expose(holder, min(self._in_flight[holder], finish))
        self._expose(start, finish)

    def _expose(self, start: str, until: float) -> None:
        waited = until - self._now
        if waited > 0.0:
            self._exposed[start] = self._exposed.get(start, 0.0) + waited
            self._spend(self._items[start], waited)

    def _copy(self, instruction: Instruction, seconds: float, *lane: str) -> None:
        """Begin a copy on its lane, whose first word is its item; one without a done stops the device."""
        self._begin(instruction.name, lane[0], seconds, [lane])
        if not instruction.opcode.endswith("-start") and instruction.opcode not in ("send", "recv"):
            self._wait(instruction.name)

    def _transfer(self, instruction: Instruction, moved: float) -> None:
        self._cost.host_bytes[instruction.name] = moved
        chip = self._timeline.chip
        rate = chip.host_link_bytes_per_second_per_chip
        # The link carries both directions at once. What a schedule has beside a transfer may be less than it
        # takes, as on v5p, whose compiler counts on a faster link (`Compiler.host_rate`): the chip waits for
        # the rest. One transfer a way goes at a time; how a chip shares its link among several is not known.
        way = "out" if to_host(self._timeline.module, instruction) else "in"
        self._copy(instruction, moved * chip.devices_per_chip / rate if rate else 0.0, HOST, way)

    def _copy_slice(self, instruction: Instruction) -> None:
        """Copy a slice out of a stack or into it, which stops the device.

        A GPU has a stream of its own for it, but copies with the processors that kernels run on: traced on
        an H200, such copies begin when a kernel leaves them room, and the next kernel when they end.
        """
        line = self._timeline
        rate = (line.chip.hbm_bytes_per_second or 0.0) * line.calibration.memory_efficiency
        if rate:
            self._spend(COPIES, moved_bytes(line.module, instruction) / rate)

    def _prefetch(self, instruction: Instruction) -> None:
        arrays = [array for array in leaves(parse_shape(instruction.shape)) if array.elements > 1]
        rate = self._timeline.chip.hbm_bytes_per_second
        moved = min((array.padded_bytes for array in arrays), default=0.0)
        self._copy(instruction, moved / rate if rate else 0.0, PREFETCH)
