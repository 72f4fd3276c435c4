"""Every place in a program where devices talk to each other, and what one run of it moves and takes.

A collective is one instruction, or a start and a done, or a chain of fusions that libtpu works it into beside
products (asynchronous collective fusion: the fusions with its channel number; the first begins and the last
ends it, and those in the bodies of loops between the two carry it on). Between TPU slices it is a send and a
receive through the hosts that carry the collective's kind and name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..hardware.topology import Topology
from ..hlo.replica_groups import Groups, axes_of_groups, axes_of_pairs
from ..hlo.shapes import leaves, parse_shape
from ..hlo.text import Collective, Instruction, Program
from .roofline import rendezvous
from .wires import ASSUMED, FUSED, POINT_TO_POINT, Algorithm, Fabric, algorithm, wire_bytes

_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_BEGINS = 'custom_call_target="AsyncCollectiveStart"'
_SYNC = re.compile(r'"is_sync":true')
# How many hops of an asynchronous operation there may be between its start and its done.
_LONGEST_CHAIN = 64


@dataclass(frozen=True, kw_only=True)
class Site:
    """A collective in the schedule of `computation`, from `start` to `end` (the same: synchronous).

    Bytes and seconds are of one run: `bytes` of the result, `wire_bytes` that one device sends, `whole_bytes`
    as for `fabric.wire_bytes`; `members` are all instructions that carry it, `inner` the one that says what
    it is.
    """

    start: str
    end: str
    computation: str
    kind: str
    axes: tuple[str, ...]
    groups: Groups
    bytes: float
    whole_bytes: float
    wire_bytes: float
    seconds: float
    algorithm: Algorithm
    resources: frozenset[tuple[object, ...]]
    members: tuple[str, ...]
    inner: str

    @property
    def asynchronous(self) -> bool:
        """Whether computing may run beside it."""
        return self.start != self.end


class Sites:
    """Finds the collectives of a program; `fabric` is that of its mesh."""

    def __init__(self, program: Program, topology: Topology, mesh: Mapping[str, int], fabric: Fabric) -> None:
        self._program = program
        self._mesh = dict(mesh)
        self._fabric = fabric
        self._topology = topology
        self._numbers = _devices(program, fabric)
        self._inner: dict[str, str] = {}
        for name, instruction in program.instructions.items():
            plain = instruction.calls is None and not instruction.opcode.endswith(("-done", "-update"))
            if instruction.collective is not None and plain:
                self._inner.setdefault(instruction.computation, name)
        # Channel → the computations in which a chain of fusions with it begins.
        self._begun: dict[str, set[str]] = {}
        for instruction in program.instructions.values():
            if instruction.opcode == "fusion" and instruction.collective is not None:
                inside = program.inside(instruction)
                names = () if inside is None else inside.instructions
                if any(_BEGINS in program.instructions[name].attributes for name in names):
                    self._begun.setdefault(self._channel(instruction), set()).add(instruction.computation)

    def of(self, computation: str) -> list[Site]:
        """Return the collectives of one computation's schedule, in its order."""
        found: list[Site] = []
        channels: dict[str, list[Instruction]] = {}
        sends: dict[str, Instruction] = {}
        receives: dict[str, Instruction] = {}
        dones: dict[str, str] = {}
        for name in self._program.computations[computation].instructions:
            instruction = self._program.instructions[name]
            opcode = instruction.opcode
            if opcode.endswith("-done") and instruction.operand:
                dones[self._begin(instruction)] = name
            if opcode == "send" and rendezvous(instruction):
                sends[rendezvous(instruction)] = instruction
            elif opcode == "recv" and rendezvous(instruction):
                receives[rendezvous(instruction)] = instruction
            elif opcode == "fusion" and instruction.collective is not None:
                channels.setdefault(self._channel(instruction), []).append(instruction)
        for name in self._program.computations[computation].instructions:
            instruction = self._program.instructions[name]
            opcode = instruction.opcode
            if opcode == "send" and rendezvous(instruction):
                receive = receives.get(rendezvous(instruction))
                end = dones.get(receive.name if receive else name, name)
                found.append(self._between_slices(instruction, end))
            elif instruction.collective is None or opcode.endswith(("-done", "-update")):
                continue
            elif opcode == "fusion":
                channel = self._channel(instruction)
                chain = channels[channel]
                carried_on = computation not in self._begun.get(channel, {computation})
                if instruction is chain[0] and not carried_on:
                    found.append(self._site(instruction, chain[-1].name, tuple(i.name for i in chain)))
            elif opcode.endswith("-start"):
                end = name if _SYNC.search(instruction.attributes) else dones.get(name, name)
                found.append(self._site(instruction, end, (name, dones.get(name, name))))
            else:
                found.append(self._site(instruction, name, (name,)))
        return found

    def _begin(self, done: Instruction) -> str:
        name = done.operand or ""
        for _ in range(_LONGEST_CHAIN):
            before = self._program.instructions.get(name)
            if before is None or not before.opcode.endswith("-update") or before.operand is None:
                break
            name = before.operand
        return name

    def _channel(self, fusion: Instruction) -> str:
        inner = self._program.instructions[self._inner[fusion.calls or ""]]
        found = _CHANNEL.search(inner.attributes)
        return found[1] if found else fusion.name

    def _site(self, start: Instruction, end: str, members: tuple[str, ...]) -> Site:
        collective = start.collective
        assert collective is not None
        inner = self._program.instructions[self._inner.get(start.calls or "", start.name)]
        result, operand = self._sizes(start, self._program.instructions[members[-1]], inner, collective)
        groups = self._renumber(collective.groups)
        whole = result if collective.kind == "all_gather" else operand
        permutes = collective.kind == "collective_permute"
        axes = axes_of_pairs(groups, self._mesh) if permutes else axes_of_groups(groups, self._mesh)
        span = self._fabric.span(groups)
        if not whole:  # an operand that is handed over in pieces or by reference
            whole = result * span.size if collective.kind == "reduce_scatter" else result
        named = algorithm(start)
        if named is ASSUMED:
            named = algorithm(inner)
        if named is ASSUMED:
            named = POINT_TO_POINT if permutes else FUSED if len(members) > 1 and start.calls else named
        return Site(
            start=start.name,
            end=end,
            computation=start.computation,
            kind=collective.kind,
            axes=axes.names,
            groups=groups,
            bytes=result,
            whole_bytes=whole,
            wire_bytes=wire_bytes(collective.kind, span.size, whole),
            seconds=self._fabric.seconds(collective.kind, groups, named, whole),
            algorithm=named,
            resources=self._fabric.resources(collective.kind, groups),
            members=members,
            inner=inner.name,
        )

    def _sizes(
        self, start: Instruction, last: Instruction, inner: Instruction, collective: Collective
    ) -> tuple[float, float]:
        """Return the bytes of the result and of the operand."""
        if start.calls is not None and inner is not start:
            operand = sum(_bytes(self._program.instructions[name]) for name in inner.operands)
            if collective.kind == "reduce_scatter":  # written as an all-reduce of the padded operand
                operand = sum(_bytes(self._program.instructions[name]) for name in start.operands)
                return _bytes(last), operand
            return _bytes(inner), operand
        operands = (self._program.instructions.get(name) for name in start.operands)
        operand = sum(_bytes(instruction) for instruction in operands if instruction is not None)
        result = last if last.opcode.endswith("-done") else start
        return _bytes(result), operand

    def _between_slices(self, send: Instruction, end: str) -> Site:
        transfer = _TRANSFER.search(send.attributes)
        kind = transfer[1].lower() if transfer else "collective_permute"
        kind = {"one_to_one": "collective_permute", "send_recv": "collective_permute"}.get(kind, kind)
        operand = _bytes(self._program.instructions[send.operands[0]]) if send.operands else 0.0
        groups = self._fabric.across_slices()
        slices = len(groups[0]) if groups else 1
        known = kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
        kind = kind if known else "collective_permute"
        result = operand * slices if kind == "all_gather" else operand
        named = Algorithm(name="MegaScale over the data-centre network")
        whole = result if kind == "all_gather" else operand
        if kind == "collective_permute":
            groups = tuple((group[0], group[1 % len(group)]) for group in groups)
        return Site(
            start=send.name,
            end=end,
            computation=send.computation,
            kind=kind,
            axes=axes_of_groups(groups, self._mesh).names,
            groups=groups,
            bytes=result,
            whole_bytes=whole,
            wire_bytes=wire_bytes(kind, slices, whole),
            seconds=self._fabric.seconds(kind, groups, named, whole),
            algorithm=named,
            resources=frozenset({("network",)}),
            members=(send.name, end),
            inner=send.name,
        )

    def _renumber(self, groups: Groups) -> Groups:
        if self._numbers is None:
            return groups
        return tuple(tuple(self._numbers[device] for device in group) for group in groups)


def _bytes(instruction: Instruction) -> float:
    return sum(array.bytes for array in leaves(parse_shape(instruction.shape)))


def _devices(program: Program, fabric: Fabric) -> list[int] | None:
    """Return for each device that the text numbers its place in the mesh, None where they are the same.

    A program for several slices is written for one of them and numbers only its devices.
    """
    one = fabric.first_slice()
    if program.num_devices == len(one) < fabric.topology.num_devices:
        return [int(place) for place in np.asarray(one)]
    return None
