"""How a framework runs a step, as an execution of the cost model: its own ways around XLA's."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import numpy as np
from meshwright.sharding.cost import collectives, compute, memory
from meshwright.sharding.cost.calibration import Calibration
from meshwright.sharding.cost.candidate import Candidate
from meshwright.sharding.cost.collectives import Link, ring_link, switched_groups
from meshwright.sharding.cost.compute import Busy, FusedAttention, Passes
from meshwright.sharding.cost.exchange import StoredOver, parts
from meshwright.sharding.cost.execution import Execution, execution_for
from meshwright.sharding.cost.kept import Residuals
from meshwright.sharding.cost.living import Worked
from meshwright.sharding.cost.memory import Standing
from meshwright.sharding.cost.placement import Placement
from meshwright.sharding.cost.profile import AFTER, LAYERS, ProgramTables
from meshwright.sharding.hardware.topology import Topology

from .record import Framework
from .stages import Dealt, DealtBy, dealt_evenly, moments, step_through_stages

# Axes over which activations are exchanged in every layer.
_ACTIVATIONS = ("tensor", "context", "expert")


@functools.lru_cache(maxsize=256)
def execution_of(record: Framework, topology: Topology) -> Execution:
    """Return how the framework of `record` runs a step on `topology`."""
    kernel = FusedAttention(share=record.attention_share, gradient=record.attention_gradient)
    return dataclasses.replace(
        execution_for(topology, kernel if record.fused_attention else None),
        # Frameworks scatter gradients as they store them, beside other work, and recipes on TPUs gather so by
        # options of libtpu's; what XLA does without any is its own.
        reduces_whole=False,
        gathers_wait=0.0,
        scatters_wait=0.0,
        sums_wait=0.0,
        # What their losses hold besides is `loss_copies`.
        gradient_beside=False,
        makes_ahead=False,
        kept=functools.partial(_kept, record),
        links=functools.partial(_links, record),
        through_stages=functools.partial(step_through_stages, dealt_by(record)),
        busy=functools.partial(_busy, record),
        standing=functools.partial(_standing, record),
        moments=functools.partial(_moments, record),
    )


def _kept(record: Framework, profile: ProgramTables, candidate: Candidate, fused: bool) -> Residuals:
    everything = "none/fused" if record.fused_residuals else "none"
    kept = profile.saved.kept(candidate, fused_attention=fused, everything=everything)
    none = np.zeros(len(kept.device), bool)
    if record.fused_residuals:
        kept = dataclasses.replace(kept, beside=np.zeros_like(kept.beside))
    steps, remat = profile.steps, candidate.remat
    layers = steps.section == LAYERS
    if remat == "none" and not (fused or record.keeps_scores):
        again = kept.again | (steps.core & layers)
        made = profile.saved.flow.given_by(again)
        kept = dataclasses.replace(kept, device=kept.device & ~profile.saved.on_chip, again=again, made=made)
    if not record.reruns_layers or remat == "names":
        return kept
    again, moved = kept.again, none
    if remat == "full":
        # Gathers and reductions are in the layer that is run again.
        again, moved = layers, profile.values.section == LAYERS
    elif remat == "dots":
        again = layers.copy()
        products = profile.products
        again[products.equation[products.role_sizes[:, 0] <= 1]] = False
    # What the model's own checkpoint runs again is run again once, not twice.
    return dataclasses.replace(kept, again=again & ~steps.rematted, made=moved, gathered=moved)


def _links(
    record: Framework, mesh: Mapping[str, int], topology: Topology, calibration: Calibration, /
) -> Mapping[str, Link]:
    if topology.is_torus or record.library_ways:
        return collectives.links(mesh, topology, calibration)
    return _switched(record, tuple(mesh.items()), topology, calibration)


@functools.lru_cache(maxsize=4096)
def _switched(
    record: Framework, mesh: tuple[tuple[str, int], ...], topology: Topology, calibration: Calibration
) -> Mapping[str, Link]:
    sizes, found = dict(mesh), {}
    for axis, (size, inside) in switched_groups(sizes, topology).items():
        share = (inside / topology.devices_per_domain) ** record.fabric_group_exponent
        busy = sizes.get("stage", 1) > 1 and axis in _ACTIVATIONS
        starts = record.pipelined_starts if busy else 1.0
        rates = dataclasses.replace(
            calibration,
            fabric_efficiency=calibration.fabric_efficiency * share,
            fabric_seconds=calibration.fabric_seconds * starts,
            network_seconds=calibration.network_seconds * starts,
        )
        found[axis] = ring_link(size, inside, topology.chip, rates)
    return found


def loss_layers(profile: ProgramTables) -> float:
    """Return what the products after the layers, the logits', weigh in layers; attention's scores aside."""
    products, steps = profile.products, profile.steps
    flops = products.flops * steps.runs[products.equation] * ~steps.core[products.equation]
    by_section = np.bincount(steps.section[products.equation], weights=flops, minlength=3)
    return float(by_section[AFTER] / (by_section[LAYERS] or 1.0) * profile.layers)


def deal_by_weight(layers: int, stages: int, loss: float) -> Dealt:
    """Return how `layers` are dealt to `stages` beside a loss that weighs `loss` of them.

    Each stage takes layers until it has its share of all the weight, so the last one gets what the others,
    rounded up, leave.

    >>> deal_by_weight(32, 4, 2.2)
    Dealt(most=9, last=6)
    """
    share = (layers + loss) / stages
    return Dealt(most=min(layers, math.ceil(share)), last=max(0, layers - math.ceil(share * (stages - 1))))


def dealt_by(record: Framework) -> DealtBy:
    """Return how the framework of `record` deals layers to stages."""
    return _dealt_by_weight if record.balanced_stages else dealt_evenly


def _dealt_by_weight(profile: ProgramTables, stages: int) -> Dealt:
    loss = loss_layers(profile)
    return deal_by_weight(profile.layers, stages, loss) if loss else dealt_evenly(profile, stages)


def _busy(record: Framework, profile: ProgramTables, once: Passes, kept: Residuals) -> Busy:
    found = compute.busy(profile, once, kept)
    seconds, waiting = found.seconds.copy(), found.waiting.copy()
    seconds[:, compute.KINDS.index("elementwise"), AFTER] *= record.loss_passes
    waiting[LAYERS] += record.layer_seconds * profile.layers
    return dataclasses.replace(found, seconds=seconds, waiting=waiting)


def _standing(
    record: Framework,
    profile: ProgramTables,
    placement: Placement,
    candidate: Candidate,
    over: StoredOver,
    slot_bytes: float,
    gradient_bytes: float | None,
    slices: int,
) -> Standing:
    found = memory.standing(profile, placement, candidate, over, slot_bytes, gradient_bytes, slices)
    table = profile.parameters
    copies = table.elements * record.copy_bytes / parts(over.computed, candidate.mesh)
    held = np.bincount(table.section, weights=copies, minlength=3)
    sums = found.items["gradients"]
    beside = np.zeros(3) if record.accumulates_in_place else sums
    return dataclasses.replace(found, items={**found.items, "framework": held}, beside=beside, sums=sums)


def _moments(
    record: Framework,
    profile: ProgramTables,
    candidate: Candidate,
    stored: Standing,
    work: Worked,
    kept: Residuals,
    last_layer_apart: bool,
) -> Iterator[dict[str, float]]:
    largest = work.largest.copy()
    largest[AFTER] *= record.loss_copies
    work = dataclasses.replace(work, largest=largest)
    for items in moments(dealt_by(record), profile, candidate, stored, work, kept, last_layer_apart):
        counted = items["saved_activations"] + items["temporaries"] + items["communication"]
        items["framework"] += record.reserved_bytes + record.memory_overhead * counted
        yield items
