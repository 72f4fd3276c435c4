"""Seconds of arithmetic and of memory traffic on one device: a roofline for each product and each kernel."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..errors import UserError
from ..hardware.chip import Chip
from .calibration import Calibration
from .candidate import Candidate
from .kept import Kept
from .placement import Placement
from .profile import AFTER, LAYERS, Profile

# Kinds of work, and passes over it; the axes of `Busy.seconds`.
KINDS = ("matmul", "attention", "elementwise")
PASSES = ("forward", "backward", "recompute")
# Elements of a role that matrix units of GPUs read at once, of 16 bits each.
_ALIGNED = 8


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Busy:
    """What one device computes for one microbatch, were it to hold all layers.

    seconds [pass, kind, section]; kernels [pass, section]: how many are started.
    """

    seconds: np.ndarray
    kernels: np.ndarray


def peak_flops(chip: Chip, dtype: str) -> float:
    """Return the matmul peak of one device. Raises UserError where `chips.toml` has none."""
    peak = chip.peak_flops(dtype)
    if peak is None:
        raise UserError(f"{chip.name} has no figure for products of {dtype}; give one in chips.toml")
    return peak


def kept_by(profile: Profile, candidate: Candidate, calibration: Calibration) -> Kept:
    """Return what a candidate keeps of the layers and runs again, as the calibration says it is run."""
    kept = profile.saved.kept(
        candidate, fused_attention=calibration.fused_attention, fused=calibration.fused_residuals
    )
    if candidate.remat == "none" and not (calibration.fused_attention or calibration.keeps_scores):
        again = kept.again | (profile.steps.core & (profile.steps.section == LAYERS))
        return dataclasses.replace(kept, device=kept.device & ~profile.saved.on_chip, again=again)
    if not calibration.reruns_layers or candidate.remat in ("none", "names"):
        return kept
    again = profile.steps.section == LAYERS
    if candidate.remat == "dots":
        products = profile.products
        again[products.equation[products.role_sizes[:, 0] <= 1]] = False
    return dataclasses.replace(kept, again=again)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What of `Busy` depends on nothing that is kept or run again: its forward and backward passes.

    products [M], groups [G]: seconds of one forward pass, all runs; launched [M], group_runs [G]: kernels.
    """

    seconds: np.ndarray
    kernels: np.ndarray
    products: np.ndarray
    launched: np.ndarray
    groups: np.ndarray
    group_runs: np.ndarray


def work(profile: Profile, placement: Placement, chip: Chip, dtype: str, calibration: Calibration) -> Work:
    """Return the seconds of one microbatch's forward and backward passes."""
    if chip.hbm_bytes_per_second is None:
        raise UserError(f"{chip.name} has no memory rate; give hbm_bytes_per_second in chips.toml")
    seconds = np.zeros((3, 3, 3))
    kernels = np.zeros((3, 3))
    products, launched = _products(profile, placement, chip, dtype, calibration, seconds, kernels)
    groups, group_runs = _kernels(
        profile, placement, chip.hbm_bytes_per_second, calibration, seconds, kernels
    )
    return Work(
        seconds=seconds,
        kernels=kernels,
        products=products,
        launched=launched,
        groups=groups,
        group_runs=group_runs,
    )


def busy(profile: Profile, once: Work, kept: Kept, calibration: Calibration) -> Busy:
    """Return the seconds of one microbatch by pass, kind and section: what is run again besides `once`."""
    seconds, kernels = once.seconds.copy(), once.kernels.copy()
    products, steps, groups = profile.products, profile.steps, profile.groups
    equation = products.equation
    section, core = steps.section[equation], steps.core[equation]
    # What a layer runs again of itself is run again once more where all of the layer is.
    times = steps.rematted[equation].astype(float) + kept.again[equation]
    if calibration.reruns_layers:
        times = np.minimum(times, 1.0)
    times = times * (products.gradients > 0)
    again = once.products * times
    seconds[2, 0] = _by_section(section, again * ~core)
    seconds[2, 1] = _by_section(section, again * core)
    kernels[2] = _by_section(section, once.launched * times)
    if len(groups.section):
        redone = np.zeros(len(groups.section), bool)
        redone[groups.of_equation[kept.again & (groups.of_equation >= 0)]] = True
        times = groups.rematted.astype(float) + redone
        if calibration.reruns_layers:
            times = np.minimum(times, 1.0)
        seconds[2, 2] = _by_section(groups.section, once.groups * times)
        seconds[2, 2, AFTER] *= calibration.loss_passes
        kernels[2] += _by_section(groups.section, once.group_runs * times)
    return Busy(seconds=seconds, kernels=kernels)


def _by_section(section: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.bincount(section, weights=weights, minlength=3)


def product_seconds(
    profile: Profile, placement: Placement, chip: Chip, dtype: str, calibration: Calibration
) -> np.ndarray:
    """Return the seconds of one run of each product [M].

    An efficiency of e / prod(1 + h / size) over its rows, columns and contraction: each role is cut into
    tiles and has a ramp. The gradients of a product swap its roles, so they are as efficient. Matrix units
    read 16 bytes at a time: a role that is no multiple of eight elements is worked through otherwise.
    """
    products = profile.products
    sizes = np.maximum(products.role_sizes * placement.role_fraction, 1.0)
    flops = products.flops * np.prod(placement.role_fraction, axis=1)
    ramp = np.prod(1.0 + calibration.matmul_half_size / sizes[:, 1:], axis=1)
    peak = peak_flops(chip, dtype) * calibration.matmul_efficiency
    if calibration.unaligned_efficiency < 1.0:
        whole = np.rint(sizes[:, 1:])
        unaligned = ((whole % _ALIGNED != 0) & (whole > _ALIGNED)).any(axis=1)
        peak = peak * np.where(unaligned, calibration.unaligned_efficiency, 1.0)
    moved = (profile.values.bytes * placement.value_fraction)[products.values].sum(axis=1)
    rate = (chip.hbm_bytes_per_second or 1.0) * calibration.memory_efficiency
    computed = np.maximum(flops * ramp / peak, moved / rate)
    if not calibration.fused_attention:
        return computed
    core = profile.steps.core[products.equation]
    # Only the contraction over heads is short in a fused kernel: it runs along the sequence.
    fused = flops * calibration.attention_share
    # Scores stay in a wider type where products are in eight bits.
    wide = "bfloat16" if dtype.startswith(("float8", "int8")) else dtype
    fused = fused / (peak_flops(chip, wide) * calibration.attention_efficiency)
    return np.where(core, fused, computed)


def _products(
    profile: Profile,
    placement: Placement,
    chip: Chip,
    dtype: str,
    calibration: Calibration,
    seconds: np.ndarray,
    kernels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    products, steps = profile.products, profile.steps
    equation = products.equation
    section, runs, core = steps.section[equation], steps.runs[equation], steps.core[equation]
    once = product_seconds(profile, placement, chip, dtype, calibration) * runs
    backward = products.gradients.copy()
    if calibration.fused_attention:
        backward[core] *= calibration.attention_gradient / 2.0
    for kind, chosen in ((0, ~core), (1, core)):
        for n, times in enumerate((1.0, backward)):
            seconds[n, kind] += _by_section(section, once * times * chosen)
    launched = np.where(core & calibration.fused_attention, 0.5, 1.0) * runs
    for n, times in enumerate((1.0, products.gradients)):
        kernels[n] += _by_section(section, launched * times)
    return once, launched


def _kernels(
    profile: Profile,
    placement: Placement,
    bytes_per_second: float,
    calibration: Calibration,
    seconds: np.ndarray,
    kernels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    groups = profile.groups
    if not len(groups.section):
        return np.zeros(0), np.zeros(0)
    size = profile.values.bytes * placement.value_fraction
    moved = size[groups.edge_value] / (bytes_per_second * calibration.memory_efficiency)
    # What fused attention does not write to memory costs nothing beyond its kernel.
    here = ~groups.core if calibration.fused_attention else np.ones(len(groups.core), bool)
    runs = groups.runs * here
    count = len(groups.section)
    forward = np.bincount(groups.edge_group, weights=moved * groups.edge_forward, minlength=count) * runs
    backward = np.bincount(groups.edge_group, weights=moved * groups.edge_backward, minlength=count) * runs
    for n, amount in enumerate((forward, backward)):
        seconds[n, 2] += _by_section(groups.section, amount)
    seconds[:2, 2, AFTER] *= calibration.loss_passes
    for n, times in enumerate((1.0, backward > 0)):
        kernels[n] += _by_section(groups.section, runs * times)
    return forward, runs
