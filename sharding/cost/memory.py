"""Bytes of one device at the fullest moment of a step, itemised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .calibration import Calibration
from .candidate import Candidate
from .compute import kept_by
from .exchange import Stored, parts
from .kept import Kept
from .pipeline import deal, in_flight
from .placement import FORWARD, Placement
from .profile import AFTER, BEFORE, LAYERS, Profile

# Axes that cut what is passed on between layers and gather it where it is worked with.
_STREAM = ("tensor", "context")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Standing:
    """What a storage asks for whatever is kept or run again.

    items: name → bytes [section]; layer: of one layer's parameters, gathered at use; after: of those the loss
    uses, gathered, and of their gradient before it is reduced; before: of the gradient of those used before
    the layers (a table of embeddings), and of its copy; sent: of what goes to other slices.
    """

    items: Mapping[str, np.ndarray]
    layer: float
    after: float
    before: float
    sent: float

    def gathered(self, phase: int) -> float:
        """Return the bytes of whole parameters and gradients in the backward pass of a section."""
        return self.sent + {BEFORE: self.before, LAYERS: self.layer, AFTER: self.after}[phase]


def standing(
    profile: Profile,
    placement: Placement,
    candidate: Candidate,
    lying: Stored,
    slot_bytes: float,
    gradient_bytes: float | None,
    calibration: Calibration,
    slices: int,
) -> Standing:
    """Return what `candidate` stores all through a step on so many `slices`."""
    layer, after, before = _gathered(profile, placement, lying)
    items = _state(profile, candidate, lying, slot_bytes, gradient_bytes, calibration.copy_bytes)
    # What a slice sends to the others lies in buffers that nothing else uses: its part of each gradient.
    sent = float(items["gradients"].sum()) / slices if slices > 1 else 0.0
    return Standing(items=items, layer=layer, after=after, before=before, sent=sent)


def peak_memory(
    profile: Profile,
    candidate: Candidate,
    stored: Standing,
    work: Worked,
    calibration: Calibration,
    platform: str,
) -> dict[str, float]:
    """Return item → bytes on the fullest pipeline stage."""
    stages = candidate.mesh.get("stage", 1)
    dealt = deal(profile.layers, stages, profile.loss_layers if calibration.balanced_stages else 0.0)
    kept = kept_by(profile, candidate, calibration)
    saved, scratch = _activations(profile, candidate, work, kept)
    # A TPU's compiler runs the last layer to come back from the host outside of the loop.
    returning = platform == "tpu" and bool(kept.host.any())
    # All of it, whatever is worked through at a time.
    batch = work.batch * candidate.microbatches
    best: dict[str, float] = {}
    for stage in dict.fromkeys((0, stages - 1)):
        share = (dealt.last if stage == stages - 1 else dealt.most) / profile.layers
        first, last = stage == 0, stage == stages - 1
        here = np.array([float(first), share, float(last)])
        held = in_flight(stage, stages, candidate.microbatches, candidate.schedule, candidate.interleave)
        holding = saved * here * np.array([1.0, held, 1.0])
        # The backward passes of the loss, the layers and what comes before them follow one another.
        for phase in [AFTER] * last + [LAYERS] + [BEFORE] * first:
            items = {name: float(row @ here) for name, row in stored.items.items()}
            if phase == AFTER and candidate.microbatches == 1:
                # Those of the layers are still to come.
                items["gradients"] = float(stored.items["gradients"][AFTER])
            elif phase != AFTER and candidate.microbatches > 1 and not calibration.accumulates_in_place:
                items["gradients"] *= 2.0
            # A layer that runs outside of the loop does so beside what follows, and in a loop over
            # microbatches keeps the others' values there.
            lasting = LAYERS if phase == BEFORE and returning and candidate.microbatches > 1 else phase
            items["saved_activations"] = float(holding[: lasting + 1].sum())
            beside = scratch[LAYERS] if returning else 0.0
            items["temporaries"] = float(beside if phase == BEFORE else scratch[phase])
            items["communication"] = stored.gathered(phase)
            items["batch"] = batch
            counted = items["saved_activations"] + items["temporaries"] + items["communication"]
            items["framework"] += calibration.reserved_bytes + calibration.memory_overhead * counted
            if sum(items.values()) > sum(best.values()):
                best = items
    return best


def _state(
    profile: Profile,
    candidate: Candidate,
    lying: Stored,
    slot_bytes: float,
    gradient_bytes: float | None,
    copy_bytes: float,
) -> Mapping[str, np.ndarray]:
    """Return parameters', gradients' and moments' bytes by section, and those of the framework's copies."""
    table, mesh = profile.parameters, candidate.mesh
    gradient = table.item_bytes if gradient_bytes is None else gradient_bytes
    rows = {
        "params": (lying.parameters, table.item_bytes),
        "gradients": (lying.gradients, gradient),
        "optimizer": (lying.optimizer, slot_bytes),
        "framework": (lying.computed, copy_bytes),
    }
    found = {}
    for name, (axes, size) in rows.items():
        divided = parts(axes, mesh)
        found[name] = np.bincount(table.section, weights=table.elements * size / divided, minlength=3)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Worked:
    """What a placement's values weigh in bytes.

    size, saved [V]: of one microbatch, in one run and in all; live, largest [section]: what fused kernels
    keep of one layer, and the largest value; batch: of the microbatch itself.
    """

    size: np.ndarray
    saved: np.ndarray
    live: np.ndarray
    largest: np.ndarray
    batch: float


def worked(
    profile: Profile,
    placement: Placement,
    mesh: Mapping[str, int],
    calibration: Calibration,
    lanes: int = 1,
) -> Worked:
    """Return what `placement`'s values weigh, whatever is kept of them.

    Rows of heads that are kept are padded to whole `lanes`.
    """
    values = profile.values
    size = values.bytes * placement.value_fraction
    batch = float(size[list(profile.inputs)].sum())
    if calibration.gathered_residuals:
        for traffic in placement.traffic:
            if traffic.kind == "all_gather" and traffic.phase == FORWARD:
                size[traffic.values] *= mesh[traffic.axis]
    if calibration.fused_attention:
        size = size * ~profile.saved.on_chip
    # What is passed on in parts is whole while it is worked with.
    used = size.copy()
    if not calibration.gathered_residuals:
        for traffic in placement.traffic:
            if traffic.kind == "all_gather" and traffic.phase == FORWARD and traffic.axis in _STREAM:
                used[traffic.values] *= mesh[traffic.axis]
    largest = np.zeros(3)
    np.maximum.at(largest, values.section, used)
    largest[AFTER] *= calibration.loss_copies
    # Casts of parameters are with what is gathered.
    rows = values.dims[:, list(profile.batch_dims)].any(axis=1) if profile.batch_dims else True
    fused = profile.saved.by_policy["none/fused"] & rows
    live = np.bincount(values.section, weights=used * fused, minlength=3)
    width = np.maximum(values.width, 1.0)
    padded = np.where(values.width > 0, np.ceil(width / lanes) * lanes / width, 1.0)
    return Worked(size=size, saved=size * padded * values.runs, live=live, largest=largest, batch=batch)


def _activations(
    profile: Profile, candidate: Candidate, work: Worked, kept: Kept
) -> tuple[np.ndarray, np.ndarray]:
    """Return what a microbatch saves by section, for all layers, and one layer's working set."""
    saved = np.bincount(
        profile.values.section, weights=work.saved * (1.0 * kept.device + kept.twice), minlength=3
    )
    scratch = work.largest.copy()
    # A layer worked through again holds what fused kernels would have saved, and the gradients that meet it.
    if candidate.remat != "none":
        scratch[LAYERS] += work.live[LAYERS]
    return saved, scratch


def _gathered(profile: Profile, placement: Placement, lying: Stored) -> tuple[float, float, float]:
    """Return the bytes of `Standing`'s layer, after and before."""
    table = profile.parameters
    extra = np.array([bool(s - c) for s, c in zip(lying.parameters, lying.computed, strict=True)], float)
    # Of layers one at a time; what stands outside is whole, however often it is used.
    turns = np.where(table.section == LAYERS, table.runs, 1.0)
    elements = table.elements * placement.parameter_fraction * extra / turns
    layer = float(elements @ (table.used_bytes * (table.section == LAYERS)))
    after = float(elements @ ((table.used_bytes + table.item_bytes) * (table.after_bytes > 0)))
    before = float(elements @ (2.0 * table.used_bytes * (table.section == BEFORE)))
    return layer, after, before
