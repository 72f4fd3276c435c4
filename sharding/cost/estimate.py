"""Seconds and bytes of a candidate, itemised."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..chips import Chip
from ..errors import UserError
from ..program.record import Program
from ..topology import Topology
from .calibration import Calibration, calibration_for
from .candidate import Candidate
from .collectives import Link, links
from .compute import KINDS, Busy, busy, kept_by, peak_flops
from .exchange import Exchange, Stored, exchange, stored
from .memory import peak_memory
from .overlap import exposed
from .pipeline import Stages, bubble_seconds, layers_per_stage
from .placement import BACKWARD, FORWARD, Placement, place
from .profile import AFTER, BEFORE, LAYERS, Profile, profile
from .recompute import Kept

# Placements kept: a search prices several storages and policies of each.
_PLACEMENTS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a candidate is predicted to cost.

    mfu is the share of the chip's peak that the program's own flops, forward and backward without
    recomputation, come to. The items of `time` (seconds) and `memory` (bytes) add up to `step_seconds` and
    `peak_bytes`.
    """

    step_seconds: float
    mfu: float
    peak_bytes: float
    time: Mapping[str, float]
    memory: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as plain values."""
        return {
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
            "peak_bytes": self.peak_bytes,
            "time": dict(self.time),
            "memory": dict(self.memory),
        }


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
        )

    def _lying(self, candidate: Candidate) -> Stored:
        """Return where everything is stored; candidates made of one another share their storage."""
        maps = (candidate.dims, candidate.stored, candidate.optimizer, candidate.gradients)
        key = (tuple(candidate.mesh.items()), *map(id, maps))
        known = self._stored.get(key)
        if known is None:
            if len(self._stored) >= _PLACEMENTS:
                self._stored.clear()
            # The maps are kept, so that no other one gets their identity.
            known = self._stored[key] = (stored(self.profile, candidate), maps)
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
            if len(self._placements) >= _PLACEMENTS:
                self._placements.clear()
            known = self._placements[key] = place(self.profile, candidate)
        return known

    def memory(self, candidate: Candidate, placement: Placement, lying: Stored) -> dict[str, float]:
        """Return item → bytes of a placed candidate on its fullest device."""
        items = peak_memory(
            self.profile,
            placement,
            candidate,
            lying,
            self.slot_bytes,
            self.gradient_bytes,
            self.calibration,
        )
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
        work = busy(table, placement, kept, chip, self.dtype, calibration)
        moved = self._exchange(candidate, placement, lying, wires, calibration)
        host = _offload(table, placement, kept, chip, calibration)
        time = _step(table, placement, candidate, calibration, wires, work, moved, kept, host)
        rate = (chip.hbm_bytes_per_second or 1.0) * calibration.optimizer_efficiency
        time["optimizer"] = _optimizer_bytes(memory, table, self.slot_bytes, self.gradient_bytes) / rate
        time["host"] += calibration.step_seconds
        doublings = math.log2(max(candidate.num_devices, 1))
        time["stragglers"] = sum(time.values()) * calibration.imbalance_per_doubling * doublings
        return {name: float(seconds) for name, seconds in time.items() if seconds}

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
            found = exchange(self.profile, placement, candidate, lying, wires, self.gradient_bytes)
            if calibration is not self.calibration:
                return found
            if len(self._exchanges) >= _PLACEMENTS:
                self._exchanges.clear()
            known = self._exchanges[key] = (found, (candidate.dims, lying))
        return known[0]


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


def _step(
    table: Profile,
    placement: Placement,
    candidate: Candidate,
    calibration: Calibration,
    wires: Mapping[str, Link],
    work: Busy,
    moved: Exchange,
    kept: Kept,
    host: _Offload,
) -> dict[str, float]:
    """Return the step's items: each by microbatch and section, then over stages and microbatches."""
    stages = candidate.mesh.get("stage", 1)
    share = layers_per_stage(table.layers, stages) / table.layers
    items = _microbatch(table, candidate, calibration, wires, work, moved, placement, kept, host)
    per_section = np.zeros(3)
    for row in items.values():
        per_section += row
    first = np.array([1.0, share, 1.0 if stages == 1 else 0.0])
    last = np.array([1.0 if stages == 1 else 0.0, share, 1.0])
    busiest = first if per_section @ first >= per_section @ last else last
    send = _send(table, placement, wires, candidate, calibration, float(per_section @ busiest))
    time: dict[str, float] = defaultdict(float)
    for name, row in items.items():
        time[name] += float(row @ busiest) * candidate.microbatches
    slowest = float(per_section @ busiest)
    together = float(per_section[BEFORE] + per_section[AFTER] + per_section[LAYERS])
    if stages > 1:
        time["send/stage"] = send * candidate.microbatches * candidate.interleave
        count = Stages(count=stages, slowest=slowest + send, together=max(together, slowest) + stages * send)
        time["bubble"] = bubble_seconds(count, candidate.interleave)
    layer = calibration.layer_seconds * layers_per_stage(table.layers, stages)
    time["host"] += (calibration.microbatch_seconds + layer) * candidate.microbatches
    _reductions(time, moved, work, busiest, calibration)
    return time


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Offload:
    """Seconds that sending values to the host and back takes: of the link, and of the device's own memory."""

    link: float = 0.0
    memory: float = 0.0


def _offload(
    table: Profile, placement: Placement, kept: Kept, chip: Chip, calibration: Calibration
) -> _Offload:
    """Return how long what is kept on the host takes to go there and come back in one microbatch."""
    if not kept.host.any():
        return _Offload()
    rate = chip.host_link_bytes_per_second_per_chip
    if rate is None:
        raise UserError(f"{chip.name} has no figure for its link to the host; give one in chips.toml")
    size = table.values.bytes * placement.value_fraction * table.values.runs
    moved = 2.0 * float((size * kept.host).sum())
    memory = (chip.hbm_bytes_per_second or 1.0) * calibration.memory_efficiency
    return _Offload(link=moved * chip.devices_per_chip / rate, memory=moved / memory)


def _microbatch(
    table: Profile,
    candidate: Candidate,
    calibration: Calibration,
    wires: Mapping[str, Link],
    work: Busy,
    moved: Exchange,
    placement: Placement,
    kept: Kept,
    host: _Offload,
) -> dict[str, np.ndarray]:
    """Return item → seconds of one microbatch by section, were a device to hold all layers."""
    items: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for kind, row in zip(KINDS, work.seconds.sum(axis=0), strict=True):
        items[f"compute/{kind}"] += row
    computing = work.seconds.sum(axis=(0, 1))
    again = _moved_again(table, kept, candidate, calibration)
    talking, starting = np.zeros(3), np.zeros(3)
    for traffic in placement.traffic:
        runs = traffic.runs * (1.0 + again[traffic.kind, traffic.phase][traffic.values])
        size = np.bincount(traffic.section, weights=traffic.bytes * runs, minlength=3)
        count = np.bincount(traffic.section, weights=runs, minlength=3)
        link = wires[traffic.axis]
        row = link.transfer(traffic.kind, 1.0) * size * (1.0 - calibration.overlap_activations)
        items[f"{traffic.kind}/{traffic.axis}"] += row
        talking += row
        starting += link.starts(traffic.kind, 1.0) * count
    fetching = {key: 2.0 * np.array(row) for key, row in moved.gathers.items()}
    for key, row in moved.scatters.items():
        fetching[key] = fetching.get(key, 0.0) + np.array(row)
    total = sum((row.sum() for row in fetching.values()), 0.0)
    if total:
        seen = exposed(total, float(computing.sum()), calibration.overlap_parameters) / total
        for (kind, axis), row in fetching.items():
            items[f"{kind}/{axis}"] += row * seen
    if host.link:
        seen = exposed(host.link, float(computing.sum()), calibration.overlap_parameters) + host.memory
        items["offload/host"] += np.array([0.0, seen, 0.0])
    # Kernels and collectives are issued ahead of the device: only where that takes longer does it show.
    issued = work.kernels.sum(axis=0) * calibration.kernel_seconds + starting
    items["host"] += np.maximum(issued - computing - talking, 0.0)
    return items


def _moved_again(
    table: Profile, kept: Kept, candidate: Candidate, calibration: Calibration
) -> Mapping[tuple[str, int], np.ndarray]:
    """Return (collective, pass) → which values [V] it moves once more, for the backward pass."""
    count = len(table.values.bytes)
    never = np.zeros(count, bool)
    made = np.zeros(count, bool)
    writes = table.writes
    made[writes.value[kept.again[writes.equation]]] = True
    gathered = never
    if calibration.reruns_layers:
        gathered = made = (table.values.section == LAYERS) & (candidate.remat == "full")
    elif not calibration.gathered_residuals:
        gathered = table.values.grad & (table.values.section == LAYERS)
    return {
        ("all_gather", FORWARD): gathered,
        ("all_reduce", FORWARD): made,
        ("reduce_scatter", FORWARD): made,
        ("all_to_all", FORWARD): made,
        **{(kind, BACKWARD): never for kind in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all")},
    }


def _send(
    table: Profile,
    placement: Placement,
    wires: Mapping[str, Link],
    candidate: Candidate,
    calibration: Calibration,
    window: float,
) -> float:
    """Return the visible seconds of passing one microbatch's stream on and its gradient back."""
    if candidate.mesh.get("stage", 1) == 1:
        return 0.0
    size = float(
        (table.values.bytes * placement.value_fraction)[list(table.carries)].sum() if table.carries else 0.0
    )
    seconds = wires["stage"].point_to_point(2.0 * size, 2.0)
    return exposed(seconds, window, calibration.overlap_stages)


def _reductions(
    time: dict[str, float],
    moved: Exchange,
    work: Busy,
    busiest: np.ndarray,
    calibration: Calibration,
) -> None:
    """Add what is reduced once a step; it runs beside the last microbatch's backward pass."""
    rows = {key: float(np.array(row) @ busiest) for key, row in moved.step.items()}
    total = sum(rows.values())
    if not total:
        return
    window = float(work.seconds[BACKWARD:].sum(axis=(0, 1)) @ busiest)
    seen = exposed(total, window, calibration.overlap_gradients) / total
    for (kind, axis), seconds in rows.items():
        time[f"{kind}/{axis}"] += seconds * seen
