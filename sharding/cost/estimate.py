"""Seconds and bytes of a candidate, itemised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ..hardware.topology import Topology
from ..plans.estimate import Estimate
from ..program.program import Program
from .calibration import Calibration, calibration_for
from .candidate import Candidate
from .collectives import Link, links
from .compute import Work, busy, kept_by, peak_flops, work
from .exchange import Exchange, Stored, exchange, stored
from .memory import Standing, Worked, peak_memory, standing, worked
from .placement import Placement, place
from .profile import Profile, profile
from .step import offload, step_seconds

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Placements kept: a search prices several storages and policies of each.
_PLACEMENTS = 4096


class Pricer:
    """Prices candidates of one program on one topology.

    Args:
      program: the traced loss; its gradient is derived, not traced.
      topology: what it runs on.
      optimizer_slots: bytes of optimizer state for each parameter element, or the sizes of its arrays' items.
      calibration: efficiencies; the shipped ones of the chip if not given.
      gradient_bytes: of one accumulated gradient; as the parameter's if not given.
      dtype: of matrix products, for their peak; ``bfloat16`` if not given.
      other: gives the Pricer for a candidate that this one is not for, None where this one is.
    """

    def __init__(
        self,
        program: Program | Profile,
        topology: Topology,
        *,
        optimizer_slots: float | Sequence[float] = 8.0,
        calibration: Calibration | None = None,
        gradient_bytes: float | None = None,
        dtype: str = "bfloat16",
        other: Callable[[Candidate], Pricer | None] | None = None,
    ) -> None:
        self.profile = program if isinstance(program, Profile) else profile(program)
        self.topology = topology
        self.slot_bytes = (
            float(sum(optimizer_slots)) if isinstance(optimizer_slots, Sequence) else float(optimizer_slots)
        )
        self.calibration = calibration_for(topology.chip.name) if calibration is None else calibration
        self.gradient_bytes = gradient_bytes
        self.dtype = dtype
        self._other = other
        self._placements: dict[object, Placement] = {}
        self._stored: dict[object, tuple[Stored, object]] = {}
        self._exchanges: dict[object, tuple[Exchange, object]] = {}
        self._standing: dict[object, tuple[Standing, object]] = {}
        self._work: dict[int, tuple[Work, Placement]] = {}
        self._worked: dict[object, tuple[Worked, object]] = {}
        products = self.profile.products
        runs = self.profile.steps.runs[products.equation]
        self.flops = float((products.flops * runs * (1.0 + products.gradients)).sum())

    def price(self, candidate: Candidate) -> Estimate:
        """Return the estimate of `candidate`."""
        if self._other is not None and (other := self._other(candidate)) is not None:
            return other.price(candidate)
        placement = self.place(candidate)
        lying = self._lying(candidate)
        memory = self.memory(candidate, placement, lying)
        time = self.time(candidate, placement, lying, memory, self.calibration)
        total = sum(time.values())
        peak = candidate.num_devices * peak_flops(self.topology.chip, self.dtype)
        return Estimate(
            step_seconds=total,
            mfu=self.flops / (total * peak),
            peak_bytes=sum(memory.values()),
            time=time,
            memory=memory,
            heap_bytes=self._heap(memory) if self.calibration.fragmentation else None,
        )

    def needed_bytes(self, candidate: Candidate) -> float:
        """Return the memory that `price` would say is needed, without what the step takes."""
        if self._other is not None and (other := self._other(candidate)) is not None:
            return other.needed_bytes(candidate)
        return self._heap(self.memory(candidate, self.place(candidate), self._lying(candidate)))

    def _heap(self, memory: Mapping[str, float]) -> float:
        passing = memory["temporaries"] + memory["communication"]
        return sum(memory.values()) + self.calibration.fragmentation * passing

    def _lying(self, candidate: Candidate) -> Stored:
        """Return where everything is stored; candidates made of one another share their storage."""
        maps = (candidate.dims, candidate.stored, candidate.optimizer, candidate.gradients)
        key = (tuple(candidate.mesh.items()), *map(id, maps))
        known = self._stored.get(key)
        if known is None:
            # The maps are kept, so that no other one gets their identity.
            known = _remembered(self._stored, key, (stored(self.profile, candidate), maps))
        return known[0]

    def place(self, candidate: Candidate) -> Placement:
        """Return `candidate` laid over the program; one that differs in storage or remat alone is known."""
        key = (
            tuple(candidate.mesh.items()),
            tuple((dim, axes) for dim, axes in candidate.dims.items() if axes),
            candidate.microbatches,
        )
        known = self._placements.get(key)
        if known is None:
            known = _remembered(self._placements, key, place(self.profile, candidate))
        return known

    def memory(self, candidate: Candidate, placement: Placement, lying: Stored) -> dict[str, float]:
        """Return item → bytes of a placed candidate on its fullest device."""
        # Microbatches and what is kept change nothing of what stands in memory all through a step.
        key = (id(lying), id(self.calibration))
        known = self._standing.get(key)
        if known is None:
            found = standing(
                self.profile,
                placement,
                candidate,
                lying,
                self.slot_bytes,
                self.gradient_bytes,
                self.calibration,
                self.topology.num_slices,
            )
            known = _remembered(self._standing, key, (found, (lying, self.calibration)))
        layers = self._worked.get(key := (id(placement), id(self.calibration)))
        if layers is None:
            made = worked(self.profile, placement, candidate.mesh, self.calibration, self.topology.chip.lanes)
            layers = _remembered(self._worked, key, (made, (placement, self.calibration)))
        platform = self.topology.chip.platform
        items = peak_memory(self.profile, candidate, known[0], layers[0], self.calibration, platform)
        return {name: float(size) for name, size in items.items()}

    def time(
        self,
        candidate: Candidate,
        placement: Placement,
        lying: Stored,
        memory: Mapping[str, float],
        calibration: Calibration,
    ) -> dict[str, float]:
        """Return item → seconds of a placed candidate under any calibration."""
        table, chip = self.profile, self.topology.chip
        wires = links(candidate.mesh, self.topology, calibration)
        kept = kept_by(table, candidate, calibration)
        once = self._passes(placement, calibration)
        done = busy(table, once, kept, calibration)
        moved = self._exchange(candidate, placement, lying, wires, calibration)
        host = offload(table, placement, kept, chip, calibration)
        time = step_seconds(table, placement, candidate, calibration, wires, done, moved, kept, host)
        rate = (chip.hbm_bytes_per_second or 1.0) * calibration.optimizer_efficiency
        time["optimizer"] = _optimizer_bytes(memory, table, self.slot_bytes, self.gradient_bytes) / rate
        time["host"] += calibration.step_seconds
        doublings = math.log2(max(candidate.num_devices, 1))
        time["stragglers"] = sum(time.values()) * calibration.imbalance_per_doubling * doublings
        return {name: float(seconds) for name, seconds in time.items() if seconds}

    def _passes(self, placement: Placement, calibration: Calibration) -> Work:
        """Return the passes over a placement, which nothing that is kept changes."""
        chip = self.topology.chip
        known = self._work.get(id(placement)) if calibration is self.calibration else None
        if known is None:
            found = work(self.profile, placement, chip, self.dtype, calibration)
            if calibration is not self.calibration:
                return found
            known = _remembered(self._work, id(placement), (found, placement))
        return known[0]

    def _exchange(
        self,
        candidate: Candidate,
        placement: Placement,
        lying: Stored,
        wires: Mapping[str, Link],
        calibration: Calibration,
    ) -> Exchange:
        """Return how parameters and gradients travel, which neither remat nor microbatches change."""
        key = (tuple(candidate.mesh.items()), id(candidate.dims), id(lying))
        known = self._exchanges.get(key) if calibration is self.calibration else None
        if known is None:
            found = exchange(
                self.profile,
                placement,
                candidate,
                lying,
                wires,
                self.gradient_bytes,
                reduces_whole=calibration.reduces_whole,
            )
            if calibration is not self.calibration:
                return found
            known = _remembered(self._exchanges, key, (found, (candidate.dims, lying)))
        return known[0]


def _remembered(known: dict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    """Keep `value` in `known`, which is emptied where it has become too long."""
    if len(known) >= _PLACEMENTS:
        known.clear()
    known[key] = value
    return value


def _optimizer_bytes(
    memory: Mapping[str, float], table: Profile, slot_bytes: float, gradient_bytes: float | None
) -> float:
    """Return what one optimizer step reads and writes: moments both ways, gradients, parameters twice."""
    item = float((table.parameters.item_bytes * table.parameters.elements).sum())
    item /= max(float(table.parameters.elements.sum()), 1.0)
    gradient = item if gradient_bytes is None else gradient_bytes
    if not slot_bytes:
        return 2.0 * memory["params"] + memory["gradients"]
    return memory["optimizer"] / slot_bytes * (2.0 * slot_bytes + gradient + 2.0 * item)
