"""Collectives of a module's schedules: what one run of each moves, over which mesh axes, and for how long.

A collective is one instruction, or a start and a done, or a chain of fusions into which libtpu merges it with
products (asynchronous collective fusion: the fusions have its channel number, the first begins it and the
last ends it, and those in the bodies of loops between the two continue it). Between TPU slices it is a send
and a receive through the hosts, which carry the collective's kind and name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..hlo.replica_groups import Groups, axes_of_groups, axes_of_pairs
from ..hlo.shapes import parse_shape, total_bytes
from ..hlo.text import Collective, HloModule, Instruction
from .roofline import rendezvous
from .wires import ASSUMED, FUSED, POINT_TO_POINT, Algorithm, Fabric, algorithm, wire_bytes

_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_BEGINS = 'custom_call_target="AsyncCollectiveStart"'
_SYNC = re.compile(r'"is_sync":true')
# Updates that an asynchronous operation may have between its start and its done.
_LONGEST_CHAIN = 64


@dataclass(frozen=True, kw_only=True)
class ScheduledCollective:
    """A collective in the schedule of a computation; bytes and seconds are those of one run.

    Attributes:
      start: the instruction that begins it.
      end: the instruction that ends it, the same one if it is synchronous.
      kind: one of `hlo.text.COLLECTIVES`.
      axes: mesh axes that its groups run over.
      groups: devices by their place in the mesh; of a permute (source, target) pairs.
      bytes: of the result.
      wire_bytes: that one device sends.
      seconds: for which it occupies its links.
      algorithm: by which it is carried out.
      resources: the links that it occupies (`wires.Span`).
      inner: the instruction that states its kind and groups, inside a fusion or wrapper.
    """

    start: str
    end: str
    kind: str
    axes: tuple[str, ...]
    groups: Groups
    bytes: float
    wire_bytes: float
    seconds: float
    algorithm: Algorithm
    resources: frozenset[tuple[object, ...]]
    inner: str

    @property
    def asynchronous(self) -> bool:
        """Whether computing may run beside it."""
        return self.start != self.end


class CollectiveFinder:
    """Finds the collectives of a module, whose devices are those of `mesh` over `fabric`."""

    def __init__(self, module: HloModule, mesh: Mapping[str, int], fabric: Fabric) -> None:
        self._module = module
        self._mesh = dict(mesh)
        self._fabric = fabric
        self._places = _places(module, fabric)
        # Computation → the collective that it consists of, if it is the inside of a fusion or wrapper.
        self._inner: dict[str, str] = {}
        for name, instruction in module.instructions.items():
            plain = instruction.calls is None and not instruction.opcode.endswith(("-done", "-update"))
            if instruction.collective is not None and plain:
                self._inner.setdefault(instruction.computation, name)
        # Channel → the computations in which a chain of fusions with its number begins.
        self._begun: dict[str, set[str]] = {}
        for instruction in module.instructions.values():
            if instruction.opcode == "fusion" and instruction.collective is not None:
                inside = module.inside(instruction)
                names = () if inside is None else inside.instructions
                if any(_BEGINS in module.instructions[name].attributes for name in names):
                    self._begun.setdefault(self._channel(instruction), set()).add(instruction.computation)

    def of(self, computation: str) -> list[ScheduledCollective]:
        """Return the collectives of one computation's schedule, in its order."""
        found: list[ScheduledCollective] = []
        channels: dict[str, list[Instruction]] = {}
        receives: dict[str, Instruction] = {}
        dones: dict[str, str] = {}
        for name in self._module.computations[computation].instructions:
            instruction = self._module.instructions[name]
            opcode = instruction.opcode
            if opcode.endswith("-done") and instruction.operand:
                dones[self.start_of(instruction)] = name
            if opcode == "recv" and rendezvous(instruction):
                receives[rendezvous(instruction)] = instruction
            elif opcode == "fusion" and instruction.collective is not None:
                channels.setdefault(self._channel(instruction), []).append(instruction)
        for name in self._module.computations[computation].instructions:
            instruction = self._module.instructions[name]
            opcode = instruction.opcode
            if opcode == "send" and rendezvous(instruction):
                receive = receives.get(rendezvous(instruction))
                end = dones.get(receive.name if receive else name, name)
                found.append(self._across_slices(instruction, end))
            elif instruction.collective is None or opcode.endswith(("-done", "-update")):
                continue
            elif opcode == "fusion":
                channel = self._channel(instruction)
                chain = channels[channel]
                continues = computation not in self._begun.get(channel, {computation})
                if instruction is chain[0] and not continues:
                    found.append(self._collective(instruction, chain[-1].name, chain[-1].name, len(chain)))
            elif opcode.endswith("-start"):
                last = dones.get(name, name)
                end = name if _SYNC.search(instruction.attributes) else last
                found.append(self._collective(instruction, end, last, 2))
            else:
                found.append(self._collective(instruction, name, name, 1))
        return found

    def start_of(self, done: Instruction) -> str:
        """Return the start of an asynchronous operation, given its done."""
        name = done.operand or ""
        for _ in range(_LONGEST_CHAIN):
            before = self._module.instructions.get(name)
            if before is None or not before.opcode.endswith("-update") or before.operand is None:
                break
            name = before.operand
        return name

    def _channel(self, fusion: Instruction) -> str:
        inner = self._module.instructions[self._inner[fusion.calls or ""]]
        found = _CHANNEL.search(inner.attributes)
        return found[1] if found else fusion.name

    def _collective(self, start: Instruction, end: str, last: str, members: int) -> ScheduledCollective:
        """Return the collective of `members` instructions from `start` to `last`, which ends with `end`."""
        collective = start.collective
        assert collective is not None
        inner = self._module.instructions[self._inner.get(start.calls or "", start.name)]
        result, operand = self._sizes(start, self._module.instructions[last], inner, collective)
        groups = self._in_mesh(collective.groups)
        whole = result if collective.kind == "all_gather" else operand
        permutes = collective.kind == "collective_permute"
        axes = axes_of_pairs(groups, self._mesh) if permutes else axes_of_groups(groups, self._mesh)
        span = self._fabric.span(groups)
        if not whole:  # an operand that is passed in pieces or by reference
            whole = result * span.size if collective.kind == "reduce_scatter" else result
        named = algorithm(start)
        if named is ASSUMED:
            named = algorithm(inner)
        if named is ASSUMED:
            named = POINT_TO_POINT if permutes else FUSED if members > 1 and start.calls else named
        return ScheduledCollective(
            start=start.name,
            end=end,
            kind=collective.kind,
            axes=axes.names,
            groups=groups,
            bytes=result,
            wire_bytes=wire_bytes(collective.kind, span.size, whole),
            seconds=self._fabric.seconds(collective.kind, groups, named, whole),
            algorithm=named,
            resources=self._fabric.resources(collective.kind, groups),
            inner=inner.name,
        )

    def _sizes(
        self, start: Instruction, last: Instruction, inner: Instruction, collective: Collective
    ) -> tuple[float, float]:
        """Return the bytes of the result and of the operand."""
        if start.calls is not None and inner is not start:
            operand = sum(_bytes(self._module.instructions[name]) for name in inner.operands)
            if collective.kind == "reduce_scatter":  # written as an all-reduce of the padded operand
                operand = sum(_bytes(self._module.instructions[name]) for name in start.operands)
                return _bytes(last), operand
            return _bytes(inner), operand
        operands = (self._module.instructions.get(name) for name in start.operands)
        operand = sum(_bytes(instruction) for instruction in operands if instruction is not None)
        result = last if last.opcode.endswith("-done") else start
        return _bytes(result), operand

    def _across_slices(self, send: Instruction, end: str) -> ScheduledCollective:
        transfer = _TRANSFER.search(send.attributes)
        kind = transfer[1].lower() if transfer else "collective_permute"
        kind = {"one_to_one": "collective_permute", "send_recv": "collective_permute"}.get(kind, kind)
        operand = _bytes(self._module.instructions[send.operands[0]]) if send.operands else 0.0
        groups = self._fabric.across_slices()
        slices = len(groups[0]) if groups else 1
        known = kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
        kind = kind if known else "collective_permute"
        result = operand * slices if kind == "all_gather" else operand
        named = Algorithm(name="MegaScale over the data-centre network")
        whole = result if kind == "all_gather" else operand
        if kind == "collective_permute":
            groups = tuple((group[0], group[1 % len(group)]) for group in groups)
        return ScheduledCollective(
            start=send.name,
            end=end,
            kind=kind,
            axes=axes_of_groups(groups, self._mesh).names,
            groups=groups,
            bytes=result,
            wire_bytes=wire_bytes(kind, slices, whole),
            seconds=self._fabric.seconds(kind, groups, named, whole),
            algorithm=named,
            resources=frozenset({("network",)}),
            inner=send.name,
        )

    def _in_mesh(self, groups: Groups) -> Groups:
        if self._places is None:
            return groups
        return tuple(tuple(self._places[device] for device in group) for group in groups)


def _bytes(instruction: Instruction) -> float:
    return total_bytes(parse_shape(instruction.shape))


def _places(module: HloModule, fabric: Fabric) -> list[int] | None:
    """Return the place in the mesh of each device that the text numbers, None where both are the same.

    The text of a program for several slices is that of one of them and numbers the devices of one alone.
    """
    one = fabric.first_slice()
    if module.num_devices == len(one) < fabric.topology.num_devices:
        return [int(place) for place in np.asarray(one)]
    return None
