"""Bytes of one device at the fullest moment of a step, itemised."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .calibration import Calibration
from .candidate import Candidate
from .compute import kept_by
from .exchange import Stored, parts
from .pipeline import in_flight, layers_per_stage
from .placement import FORWARD, Placement
from .profile import AFTER, BEFORE, LAYERS, Profile
from .recompute import Kept


def peak_memory(
    profile: Profile,
    placement: Placement,
    candidate: Candidate,
    lying: Stored,
    slot_bytes: float,
    gradient_bytes: float | None,
    calibration: Calibration,
) -> dict[str, float]:
    """Return item → bytes on the fullest pipeline stage."""
    stages = candidate.mesh.get("stage", 1)
    share = layers_per_stage(profile.layers, stages) / profile.layers
    kept = _state(profile, placement, candidate, lying, slot_bytes, gradient_bytes)
    saved, scratch = _activations(
        profile, placement, candidate, kept_by(profile, candidate, calibration), calibration
    )
    gathered = _gathered(profile, placement, candidate.mesh, lying)
    # All of it, whatever is worked through at a time.
    part = profile.values.bytes * placement.value_fraction * candidate.microbatches
    batch = float(part[list(profile.inputs)].sum())
    best: dict[str, float] = {}
    for stage in dict.fromkeys((0, stages - 1)):
        weights = np.array([stage == 0, share, stage == stages - 1], float)
        items = {name: float(row @ weights) for name, row in kept.items()}
        held = in_flight(stage, stages, candidate.microbatches, candidate.schedule, candidate.interleave)
        outside = saved[AFTER] * weights[AFTER] + saved[BEFORE] * weights[BEFORE]
        items["saved_activations"] = held * share * saved[LAYERS] + outside
        items["temporaries"] = float(max(scratch[LAYERS], scratch[AFTER] * weights[AFTER]))
        items["batch"] = batch
        items["communication"] = float((gathered * (weights > 0)).max())
        counted = sum(items.values())
        items["framework"] = calibration.reserved_bytes + calibration.memory_overhead * counted
        if sum(items.values()) > sum(best.values()):
            best = items
    return best


def _state(
    profile: Profile,
    placement: Placement,
    candidate: Candidate,
    lying: Stored,
    slot_bytes: float,
    gradient_bytes: float | None,
) -> Mapping[str, np.ndarray]:
    """Return parameters', gradients' and moments' bytes by section."""
    table, mesh = profile.parameters, candidate.mesh
    gradient = table.item_bytes if gradient_bytes is None else gradient_bytes
    rows = {
        "params": (lying.parameters, table.item_bytes),
        "gradients": (lying.gradients, gradient),
        "optimizer": (lying.optimizer, slot_bytes),
    }
    found = {}
    for name, (axes, size) in rows.items():
        divided = parts(axes, mesh)
        found[name] = np.bincount(table.section, weights=table.elements * size / divided, minlength=3)
    return found


def _activations(
    profile: Profile, placement: Placement, candidate: Candidate, kept: Kept, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray]:
    """Return what a microbatch saves by section, for all layers, and one layer's working set."""
    values, masks = profile.values, profile.saved.by_policy
    size = values.bytes * placement.value_fraction
    if calibration.gathered_residuals:
        for traffic in placement.traffic:
            if traffic.kind == "all_gather" and traffic.phase == FORWARD:
                size[traffic.values] *= candidate.mesh[traffic.axis]
    if calibration.fused_attention:
        size = size * ~profile.saved.on_chip
    runs = values.runs
    saved = np.bincount(values.section, weights=size * kept.device * runs, minlength=3)
    # A layer worked through again holds what fused kernels would have saved, and the gradients that meet it.
    live = np.bincount(values.section, weights=size * masks["none/fused"], minlength=3)
    largest = np.array([size[values.section == s].max(initial=0.0) for s in range(3)])
    scratch = largest
    if candidate.remat != "none":
        scratch[LAYERS] += live[LAYERS]
    # One layer's values on their way to the host and another's on their way back.
    scratch[LAYERS] += 2.0 * float((size * kept.host).sum())
    return saved, scratch


def _gathered(profile: Profile, placement: Placement, mesh: Mapping[str, int], lying: Stored) -> np.ndarray:
    """Return the bytes of two layers' gathered parameters (one in use, one on its way) by section."""
    table = profile.parameters
    extra = np.array([bool(s - c) for s, c in zip(lying.parameters, lying.computed, strict=True)], float)
    size = table.elements * table.used_bytes * placement.parameter_fraction * extra / table.runs
    both = np.bincount(table.section, weights=size, minlength=3)
    both[LAYERS] *= 2.0
    return both
