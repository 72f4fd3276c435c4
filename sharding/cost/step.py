"""Seconds of one step from those of its parts: a microbatch by section, then over stages and microbatches."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np

from ..hardware.chip import Chip, unknown_figure
from .calibration import Calibration
from .candidate import Candidate
from .collectives import Link
from .compute import KINDS, Busy
from .exchange import Exchange, StoredOver
from .kept import Residuals
from .placement import BACKWARD, Placement
from .profile import ProgramTables


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepParts:
    """What a step's seconds are made of: those of one microbatch, were each device to hold all layers.

    Attributes:
      table: the program's tables.
      placement: the candidate laid over them.
      candidate: its mesh, microbatches and schedule.
      over: where its parameters and their gradients are stored.
      chip: what a device is.
      calibration: what overlaps, and the host's times.
      wires: the link of each mesh axis.
      work: what a device computes for a microbatch.
      moved: how parameters and gradients travel.
      kept: what is kept and run again.
      host: what goes to the host and back.
      stacking: seconds of stacking what layers keep; see `stacking_seconds`.
      gradient_bytes: of one accumulated gradient; as the parameter's if None.
      product: bytes of an element as products take it, at most.
      gathers_wait, scatters_wait, sums_wait: shares of gathers of parameters and of reductions of gradients
        that nothing hides, see `Execution`.
      late, late_bytes: seconds of the gradients of layers' weights in a microbatch, where these are delayed,
        and the bytes that they are made of.
      over_ticks: bytes that layers keep of a microbatch, where stages keep them until they go back.
    """

    table: ProgramTables
    placement: Placement
    candidate: Candidate
    over: StoredOver
    chip: Chip
    calibration: Calibration
    wires: Mapping[str, Link]
    work: Busy
    moved: Exchange
    kept: Residuals
    host: Offload
    stacking: float = 0.0
    gradient_bytes: float | None = None
    product: float = math.inf
    gathers_wait: float = 0.0
    scatters_wait: float = 0.0
    sums_wait: float = 0.0
    late: float = 0.0
    late_bytes: float = 0.0
    over_ticks: float = 0.0


# Gives the seconds of a step that goes through stages.
ThroughStages = Callable[[StepParts], dict[str, float]]


def step_seconds(parts: StepParts, through_stages: ThroughStages) -> dict[str, float]:
    """Return the items of a step in seconds: those of a microbatch, over stages and microbatches."""
    candidate = parts.candidate
    if candidate.mesh.get("stage", 1) > 1:
        return through_stages(parts)
    time: dict[str, float] = defaultdict(float)
    for name, row in microbatch(parts).items():
        time[name] += float(row.sum()) * candidate.microbatches
    time["host"] += parts.calibration.microbatch_seconds * candidate.microbatches
    reduce_once(time, parts, np.ones(3))
    return time


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Turns:
    """How much of one microbatch a device does, by section, in microbatches of all rows and layers.

    rows: of what grows with the rows and layers that it has; whole: how often it begins, and gathers what it
    computes with, whatever rows it has; gathers: how often parameters are gathered each time.
    """

    rows: np.ndarray
    whole: np.ndarray
    gathers: np.ndarray


# A microbatch by itself. Parameters are gathered for the forward and once more for the backward pass.
ONCE = Turns(rows=np.ones(3), whole=np.ones(3), gathers=np.full(3, 2.0))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """Seconds that sending values to the host and back takes: of the link, and of the device's own memory.

    room: seconds of other work that the compiler's schedule leaves beside the transfers, at most.
    """

    link: float = 0.0
    memory: float = 0.0
    room: float = math.inf


def offload(
    table: ProgramTables,
    placement: Placement,
    kept: Residuals,
    chip: Chip,
    calibration: Calibration,
    *,
    host_rate: float | None = None,
    product: float = 0.0,
) -> Offload:
    """Return how long what is kept on the host takes to go there and come back in one microbatch.

    The devices of a chip share its link; each reads from its own memory what it sends, and writes what comes.
    A compiler that takes the link to be of `host_rate` begins a transfer only so much earlier than it is
    waited for; what it places between are whole products, of `product` seconds each.
    """
    if not kept.host.any():
        return Offload()
    rate = chip.host_link_bytes_per_second_per_chip
    if rate is None:
        raise unknown_figure(chip, "its link to the host", "host_link_bytes_per_second_per_chip")
    size = table.values.bytes * placement.value_fraction * table.values.runs
    sizes, runs = (size * kept.host)[kept.host], table.values.runs[kept.host]
    moved = 2.0 * float(sizes.sum())
    room = math.inf
    if host_rate is not None:
        each = sizes * chip.devices_per_chip / np.maximum(runs, 1.0) / host_rate
        between = np.ceil(each / product) * product if product else each
        room = 2.0 * float((np.minimum(between, each * host_rate / rate) * runs).sum())
    memory = (chip.hbm_bytes_per_second or 1.0) * calibration.memory_efficiency
    return Offload(link=moved * chip.devices_per_chip / rate, memory=moved / memory, room=room)


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
    size = values.bytes * placement.value_fraction * values.runs * table.saved.layers
    if fused_attention:
        size = size * ~table.saved.on_chip
    moved = calibration.kept_passes * float((size * (1.0 * kept.device + kept.beside)).sum())
    return moved / ((chip.hbm_bytes_per_second or 1.0) * calibration.memory_efficiency)


def microbatch(parts: StepParts, turns: Turns = ONCE) -> dict[str, np.ndarray]:
    """Return item → seconds by section of one microbatch, or of the `turns` that a device takes at it."""
    calibration, wires, work, moved = parts.calibration, parts.wires, parts.work, parts.moved
    items: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for kind, row in zip(KINDS, work.by_kind, strict=True):
        items[f"compute/{kind}"] += row * turns.rows
    computing = work.by_section * turns.rows
    talking, starting = np.zeros(3), np.zeros(3)
    for traffic in parts.placement.traffic:
        link = wires[traffic.axis]
        if turns is ONCE:
            busy, starts = traffic.over(link, parts.kept)
        else:
            size, count = traffic.under(parts.kept)
            # Only the bytes are cut where a device takes part of the rows at a turn.
            busy = link.transfer(traffic.kind, size * turns.rows, count * turns.whole)
            starts = link.starts(traffic.kind, 1.0) * count * turns.whole
        row = busy * (1.0 - calibration.overlap_activations)
        items[f"{traffic.kind}/{traffic.axis}"] += row
        talking += row
        starting += starts
    fetching: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(3))
    for (kind, axis), row in (*moved.gathers.items(), *moved.scatters.items()):
        spent = np.array(row) * turns.whole * (turns.gathers if kind == "all_gather" else 1.0)
        waits = _waits(parts, kind, axis)
        if waits:
            items[f"{kind}/{axis}"] += waits * spent
        fetching[kind, axis] += (1.0 - waits) * spent
    total = sum((row.sum() for row in fetching.values()), 0.0)
    if total:
        seen = exposed(total, float(computing.sum()), calibration.overlap_parameters) / total
        for (kind, axis), row in fetching.items():
            items[f"{kind}/{axis}"] += row * seen
    host = parts.host
    if host.link:
        hidden = min(calibration.overlap_host * float(computing.sum()), host.room)
        seen = max(host.link - hidden, 0.0) + host.memory
        items["offload/host"] += np.array([0.0, seen, 0.0]) * turns.rows
    # Kernels and collectives are issued ahead of the device: only where that takes longer does it show.
    issued = work.started * calibration.kernel_seconds * turns.whole + starting
    items["host"] += np.maximum(issued - computing - talking, 0.0) + work.waiting * turns.whole
    if parts.stacking:
        items["kept"] = np.array([0.0, parts.stacking, 0.0]) * turns.rows
    return items


def _waits(parts: StepParts, kind: str, axis: str) -> float:
    """Return the share of a collective's seconds that nothing is scheduled beside."""
    if parts.chip.torus_dims and not parts.wires[axis].is_torus:
        return 0.0  # Between slices of TPUs all goes beside other work.
    return {"all_gather": parts.gathers_wait, "reduce_scatter": parts.scatters_wait}.get(
        kind, parts.sums_wait
    )


def reduce_once(time: dict[str, float], parts: StepParts, here: np.ndarray) -> None:
    """Add what is reduced once a step, of the share of each section that is `here`.

    It runs beside the last microbatch's backward pass, unless a TPU's compiler runs it by itself.
    """
    calibration = parts.calibration
    rows = {key: float(np.array(row) @ here) for key, row in parts.moved.step.items()}
    if parts.chip.torus_dims:
        for (kind, axis), seconds in rows.items():
            waited = _waits(parts, kind, axis) * seconds
            time[f"{kind}/{axis}"] += waited
            rows[kind, axis] = seconds - waited
    window = float(parts.work.seconds[BACKWARD:].sum(axis=(0, 1)) @ here)
    # In the order of the rows: in that of a set of strings, sums would differ from process to process.
    whole = [key for key in rows if key[0] == "all_reduce"]
    cut = [key for key in rows if key[0] != "all_reduce"]
    for keys, share in ((whole, calibration.overlap_gradients), (cut, calibration.overlap_shards)):
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


def optimizer_bytes(
    memory: Mapping[str, float], table: ProgramTables, slot_bytes: float, gradient_bytes: float | None
) -> float:
    """Return the bytes that an optimizer's step moves: moments and parameters both ways, gradients one way.

    Of the parameters that a device updates: as many as it has moments of, or all that it has without any.
    """
    trained = table.parameters.elements * table.parameters.trained
    sizes = table.parameters.item_bytes * trained
    item = float(sizes.sum()) / max(float(trained.sum()), 1.0)
    gradient = item if gradient_bytes is None else gradient_bytes
    if not slot_bytes:
        kept = table.parameters.elements * (1.0 - table.parameters.state)
        whole = float((table.parameters.item_bytes * kept).sum())
        return 2.0 * memory["params"] * float(sizes.sum()) / max(whole, 1.0) + memory["gradients"]
    return memory["optimizer"] / slot_bytes * (2.0 * slot_bytes + gradient + 2.0 * item)
