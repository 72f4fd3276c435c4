"""Seconds of one step from those of its parts: a microbatch by section, then over stages and microbatches."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from ..errors import UserError
from ..hardware.chip import Chip
from .calibration import Calibration
from .candidate import Candidate
from .collectives import Link
from .compute import KINDS, Busy
from .exchange import Exchange
from .kept import Residuals
from .pipeline import Dealt, Stages, bubble_seconds
from .placement import BACKWARD, FORWARD, Placement
from .profile import AFTER, BEFORE, LAYERS, ProgramTables


def step_seconds(
    table: ProgramTables,
    placement: Placement,
    candidate: Candidate,
    calibration: Calibration,
    wires: Mapping[str, Link],
    dealt: Dealt,
    work: Busy,
    moved: Exchange,
    kept: Residuals,
    host: Offload,
    stacking: float = 0.0,
) -> dict[str, float]:
    """Return the step's items in seconds: each by microbatch and section, then over stages and microbatches.

    Args:
      table: the program's tables.
      placement: the candidate laid over them.
      candidate: its mesh, microbatches and schedule.
      calibration: what overlaps, and the host's times.
      wires: the link of each mesh axis.
      dealt: the layers of the fullest stages and of the last.
      work: what a device computes for a microbatch.
      moved: how parameters and gradients travel.
      kept: what is kept and run again.
      host: what goes to the host and back.
      stacking: seconds of stacking what layers keep; see `stacking_seconds`.
    """
    stages = candidate.mesh.get("stage", 1)
    items = _microbatch(table, calibration, wires, work, moved, placement, kept, host)
    if stacking:
        items["kept"] = np.array([0.0, stacking, 0.0])
    per_section = np.zeros(3)
    for row in items.values():
        per_section += row
    # The first stage has what comes before the layers, the last one the loss: the step waits for the slower.
    first = np.array([1.0, dealt.most / table.layers, 1.0 if stages == 1 else 0.0])
    last = np.array([1.0 if stages == 1 else 0.0, dealt.last / table.layers, 1.0])
    busiest = first if per_section @ first >= per_section @ last else last
    send = _send(table, placement, wires, candidate, calibration, float(per_section @ busiest))
    time: dict[str, float] = defaultdict(float)
    for name, row in items.items():
        time[name] += float(row @ busiest) * candidate.microbatches
    slowest = float(per_section @ busiest)
    together = float(per_section[BEFORE] + per_section[AFTER] + per_section[LAYERS])
    if stages > 1:
        # A microbatch passes each of a stage's chunks: so many borders as there are chunks.
        time["send/stage"] = send * candidate.microbatches * candidate.interleave
        count = Stages(slowest=slowest + send, together=max(together, slowest) + stages * send)
        time["bubble"] = bubble_seconds(count, candidate.interleave)
    time["host"] += calibration.microbatch_seconds * candidate.microbatches
    _reductions(time, moved, work, busiest, calibration)
    return time


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """Seconds that sending values to the host and back takes: of the link, and of the device's own memory."""

    link: float = 0.0
    memory: float = 0.0


def offload(
    table: ProgramTables, placement: Placement, kept: Residuals, chip: Chip, calibration: Calibration
) -> Offload:
    """Return how long what is kept on the host takes to go there and come back in one microbatch.

    The devices of a chip share its link; each reads from its own memory what it sends, and writes what comes.
    """
    if not kept.host.any():
        return Offload()
    rate = chip.host_link_bytes_per_second_per_chip
    if rate is None:
        raise UserError(f"{chip.name} has no figure for its link to the host; give one in chips.toml")
    size = table.values.bytes * placement.value_fraction * table.values.runs
    moved = 2.0 * float((size * kept.host).sum())
    memory = (chip.hbm_bytes_per_second or 1.0) * calibration.memory_efficiency
    return Offload(link=moved * chip.devices_per_chip / rate, memory=moved / memory)


def stacking_seconds(
    table: ProgramTables,
    placement: Placement,
    kept: Residuals,
    chip: Chip,
    calibration: Calibration,
    *,
    fused_attention: bool,
) -> float:
    """Return how long the stacks of what layers keep take in one microbatch, all layers on one stage.

    A loop over layers hands its kept values to the backward loop as arrays of all its turns.
    """
    if not calibration.kept_passes or table.layers == 1:
        return 0.0
    values = table.values
    size = values.bytes * placement.value_fraction * values.runs * (values.section == LAYERS)
    if fused_attention:
        size = size * ~table.saved.on_chip
    moved = calibration.kept_passes * float((size * (1.0 * kept.device + kept.twice)).sum())
    return moved / ((chip.hbm_bytes_per_second or 1.0) * calibration.memory_efficiency)


def _microbatch(
    table: ProgramTables,
    calibration: Calibration,
    wires: Mapping[str, Link],
    work: Busy,
    moved: Exchange,
    placement: Placement,
    kept: Residuals,
    host: Offload,
) -> dict[str, np.ndarray]:
    """Return item → seconds of one microbatch by section, were a device to hold all layers."""
    items: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for kind, row in zip(KINDS, work.seconds.sum(axis=0), strict=True):
        items[f"compute/{kind}"] += row
    computing = work.seconds.sum(axis=(0, 1))
    talking, starting = np.zeros(3), np.zeros(3)
    for traffic in placement.traffic:
        size, count = traffic.once
        if traffic.phase == FORWARD:
            # What is made again in the backward pass is moved again for it.
            again = kept.gathered if traffic.kind == "all_gather" else kept.made
            added = traffic.of(traffic.runs * again[traffic.values])
            size, count = size + added[0], count + added[1]
        link = wires[traffic.axis]
        row = link.transfer(traffic.kind, 1.0) * size * (1.0 - calibration.overlap_activations)
        items[f"{traffic.kind}/{traffic.axis}"] += row
        talking += row
        starting += link.starts(traffic.kind, 1.0) * count
    # Parameters are gathered for the forward and once more for the backward pass.
    fetching = {key: 2.0 * np.array(row) for key, row in moved.gathers.items()}
    for key, row in moved.scatters.items():
        fetching[key] = fetching.get(key, 0.0) + np.array(row)
    total = sum((row.sum() for row in fetching.values()), 0.0)
    if total:
        seen = exposed(total, float(computing.sum()), calibration.overlap_parameters) / total
        for (kind, axis), row in fetching.items():
            items[f"{kind}/{axis}"] += row * seen
    if host.link:
        seen = exposed(host.link, float(computing.sum()), calibration.overlap_host) + host.memory
        items["offload/host"] += np.array([0.0, seen, 0.0])
    # Kernels and collectives are issued ahead of the device: only where that takes longer does it show.
    issued = work.kernels.sum(axis=0) * calibration.kernel_seconds + starting
    items["host"] += np.maximum(issued - computing - talking, 0.0) + work.waiting
    return items


def _send(
    table: ProgramTables,
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
    # The stream goes forward and its gradient, as large, back.
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
    window = float(work.seconds[BACKWARD:].sum(axis=(0, 1)) @ busiest)
    whole = {key for key in rows if key[0] == "all_reduce"}
    for keys, share in (
        (whole, calibration.overlap_gradients),
        (rows.keys() - whole, calibration.overlap_shards),
    ):
        total = sum(rows[key] for key in keys)
        seen = exposed(total, window, share) / total if total else 0.0
        for kind, axis in keys:
            time[f"{kind}/{axis}"] += rows[kind, axis] * seen


def exposed(communication: float, work: float, share: float) -> float:
    """Return the seconds of `communication` that stay visible beside `work`.

    `share` of the work can hide communication: gathering a layer's parameters runs beside the layer before,
    reducing its gradients beside the backward pass of the next one, sending to the next stage beside the
    microbatch after.
    """
    return max(0.0, communication - share * work)
