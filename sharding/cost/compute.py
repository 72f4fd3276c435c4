"""Seconds of arithmetic and of memory traffic on one device: a roofline for each product and each kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from ..hardware.chip import Chip, unknown_figure
from ..ops.grouped import TILES
from .calibration import Calibration
from .grouped import GroupedWork, grouped_seconds
from .kept import Residuals
from .placement import Placement
from .profile import LAYERS, Products, ProgramTables

# Kinds of work, the second axis of `Busy.seconds`; the first are passes: forward, backward, run again.
KINDS = ("matmul", "attention", "elementwise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedAttention:
    """A kernel that carries out attention, its scores never in memory.

    share:    of all scores, how many it computes (1/2: the half that causality hides is skipped).
    gradient: the work of its backward pass over that of its forward pass (2.5: five products over two, since
              it computes the scores once more).
    masked:   of its work, how much is with segments that it reads as a mask of queries by keys.
    scratch:  bytes that its gradient works in, for each element of its result.
    slices:   bytes of what it reads of keys and values in parts, for each element of its result.
    calls:    what is otherwise for single calls, by their index, where a program's differ.
    """

    share: float = 1.0
    gradient: float = 2.0
    masked: float = 0.0
    scratch: float = 0.0
    slices: float = 0.0
    calls: Mapping[int, FusedAttention] = dataclasses.field(default_factory=dict)

    def of(self, name: str, calls: np.ndarray) -> np.ndarray:
        """Return a field's value for each of the indices `calls` [M]."""
        found = np.full(len(calls), getattr(self, name), float)
        for index, own in self.calls.items():
            found[calls == index] = getattr(own, name)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttendedSeconds:
    """Seconds of one run of a call of attention on a device, forward and backward."""

    forward: float
    backward: float

    def plus(self, other: AttendedSeconds) -> AttendedSeconds:
        """Return the seconds of both."""
        return AttendedSeconds(forward=self.forward + other.forward, backward=self.backward + other.backward)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Busy:
    """What one device computes for one microbatch, were it to hold all layers.

    seconds [pass, kind, section]; kernels [pass, section]: how many are started; waiting [section]: seconds
    of its host that no computing hides.
    """

    seconds: np.ndarray
    kernels: np.ndarray
    waiting: np.ndarray

    @functools.cached_property
    def by_kind(self) -> np.ndarray:
        """Seconds [kind, section] of all passes."""
        return self.seconds.sum(axis=0)

    @functools.cached_property
    def by_section(self) -> np.ndarray:
        """Seconds [section] of all passes and kinds."""
        return self.seconds.sum(axis=(0, 1))

    @functools.cached_property
    def started(self) -> np.ndarray:
        """Kernels [section] of all passes."""
        return self.kernels.sum(axis=0)


def peak_flops(chip: Chip, dtype: str) -> float:
    """Return the matmul peak of one device. Raises UserError where `chips.toml` has none."""
    peak = chip.peak_flops(dtype)
    if peak is None:
        raise unknown_figure(chip, f"products of {dtype}", chip.peak_key(dtype))
    return peak


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Passes:
    """What of `Busy` depends on nothing that is kept or run again: its forward and backward passes.

    products [M], groups [G]: seconds of one forward pass, all runs; launched [M], group_runs [G]: kernels;
    products_back [M], groups_back [G]: seconds of the backward pass.
    """

    seconds: np.ndarray
    kernels: np.ndarray
    products: np.ndarray
    products_back: np.ndarray
    launched: np.ndarray
    groups: np.ndarray
    groups_back: np.ndarray
    group_runs: np.ndarray


def passes(
    profile: ProgramTables,
    placement: Placement,
    chip: Chip,
    dtype: str,
    calibration: Calibration,
    kernel: FusedAttention | None,
    aligned_elements: int,
    grouped: str = TILES,
    *,
    attended: Mapping[int, AttendedSeconds] | None = None,
    wide_gradients: bool = False,
    short_sums: bool = False,
) -> Passes:
    """Return the seconds of one microbatch's forward and backward passes.

    Args:
      profile: the program's tables.
      placement: the parts that a device has of them.
      chip: its peak and its memory's rate.
      dtype: of the products' operands.
      calibration: the shares of both rates that are reached.
      kernel: what carries out attention; None where products and elementwise work do.
      aligned_elements: of a product's role that matrix units read at once.
      grouped: what multiplies rows by their experts, as in `ops.products`.
      attended: seconds of calls of attention, by their index, which say more than `kernel` does.
      wide_gradients: whether gradients of 16-bit products into float32 are products of float32.
      short_sums: whether those of look-ups in 16-bit tables are summed in 16 bits.
    """
    if chip.hbm_bytes_per_second is None:
        raise unknown_figure(chip, "its memory's rate", "hbm_bytes_per_second")
    seconds, kernels = np.zeros((3, 3, 3)), np.zeros((3, 3))
    once = product_seconds(profile, placement, chip, dtype, calibration, kernel, aligned_elements)
    backward = profile.products.gradients.copy()
    _by_group(profile, placement, chip, dtype, calibration, grouped, once, backward)
    if wide_gradients:
        slower = peak_flops(chip, dtype) / (peak_flops(chip, "float32") * calibration.float32_efficiency)
        backward[profile.products.widens] *= slower
    products, products_back, launched = _products(
        profile, once, backward, kernel, calibration, attended or {}, seconds, kernels
    )
    rate = chip.hbm_bytes_per_second * calibration.memory_efficiency
    groups, groups_back, group_runs = _kernels(profile, placement, rate, kernel, seconds, kernels)
    if short_sums:
        for one in profile.short_sums:
            added = one.elements * placement.value_fraction[one.value]
            seconds[1, 2, one.section] += added * calibration.short_sum_seconds
    return Passes(
        seconds=seconds,
        kernels=kernels,
        products=products,
        products_back=products_back,
        launched=launched,
        groups=groups,
        groups_back=groups_back,
        group_runs=group_runs,
    )


def busy(profile: ProgramTables, once: Passes, kept: Residuals) -> Busy:
    """Return the seconds of one microbatch with what is run again besides `once`."""
    seconds, kernels = once.seconds.copy(), once.kernels.copy()
    products, steps, groups = profile.products, profile.steps, profile.groups
    equation = products.equation
    section, core = steps.section[equation], steps.core[equation]
    # What the user's own checkpoint runs again within a layer is run once more where the layer is.
    times = steps.rematted[equation].astype(float) + kept.again[equation]
    # What no gradient flows through depends on data alone, and nothing waits for it a second time.
    times = times * (products.gradients > 0)
    again = once.products * times
    seconds[2, 0] = _by_section(section, again * ~core)
    seconds[2, 1] = _by_section(section, again * core)
    kernels[2] = _by_section(section, once.launched * times)
    if len(groups.section):
        redone = np.zeros(len(groups.section), bool)
        redone[groups.of_equation[kept.again & (groups.of_equation >= 0)]] = True
        times = groups.rematted.astype(float) + redone
        seconds[2, 2] = _by_section(groups.section, once.groups * times)
        kernels[2] += _by_section(groups.section, once.group_runs * times)
    return Busy(seconds=seconds, kernels=kernels, waiting=np.zeros(3))


def layer_product(profile: ProgramTables, once: Passes) -> float:
    """Return the seconds that a product of a layer takes, where a second of them falls."""
    equation = profile.products.equation
    chosen = (profile.steps.section[equation] == LAYERS) & ~profile.steps.core[equation]
    chosen &= (once.launched > 0) & (once.products > 0)
    seconds = once.products[chosen]
    return float((seconds**2 / once.launched[chosen]).sum() / seconds.sum()) if chosen.any() else 0.0


def _by_section(section: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.bincount(section, weights=weights, minlength=3)


def product_seconds(
    profile: ProgramTables,
    placement: Placement,
    chip: Chip,
    dtype: str,
    calibration: Calibration,
    kernel: FusedAttention | None = None,
    aligned_elements: int = 1,
) -> np.ndarray:
    """Return the seconds of one run of each product [M]: a roofline (Williams et al. 2009).

    The efficiency e / prod(1 + h / size) over rows, columns and contraction: each role is cut into tiles and
    has a ramp of h elements in which the matrix units fill or drain, so that size / (size + h) of its time is
    useful. A product's gradients swap its roles, which leaves the efficiency as it is. Without rows, columns
    or contraction it is a sum of products to compilers, and the vector units' where these are faster.
    """
    products = profile.products
    sizes = np.maximum(products.role_sizes * placement.fractions.roles, 1.0)
    flops = products.flops * np.prod(placement.fractions.roles, axis=1)
    peak = peak_flops(chip, dtype) * product_share(sizes[:, 1:], calibration, aligned_elements)
    if dtype == "float32":
        peak *= calibration.float32_efficiency
    moved = (profile.values.bytes * placement.value_fraction)[products.values].sum(axis=1)
    rate = (chip.hbm_bytes_per_second or 1.0) * calibration.memory_efficiency
    computed = flops / peak
    if chip.vector_f32_flops is not None:
        summed = flops / (chip.vector_f32_flops * calibration.matmul_efficiency)
        # By the whole product's roles: a cut never makes it cheaper at once, and the search's bounds hold.
        short = (products.role_sizes[:, 1:] < 2).any(axis=1)
        computed = np.where(short, np.minimum(computed, summed), computed)
    computed = np.maximum(computed, moved / rate)
    if kernel is None:
        return computed
    core = profile.steps.core[products.equation]
    # Scores stay in a wider type where products are in eight bits.
    wide = "bfloat16" if dtype.startswith(("float8", "int8")) else dtype
    # Of scores and of their sum with values, columns and contraction are the keys and a head's width.
    roles = np.maximum(products.role_sizes[:, 2:], 1.0)
    share = kernel.of("share", products.call)
    reached = attention_share(roles.min(axis=1), roles.max(axis=1) * share, calibration)
    fused = flops * share / (peak_flops(chip, wide) * reached)
    return np.where(core, fused, computed)


def product_share(sizes: np.ndarray, calibration: Calibration, aligned_elements: int = 1) -> np.ndarray:
    """Return the share of the peak that products [M] reach, of rows, columns and contraction [M, 3]."""
    share = calibration.matmul_efficiency / np.prod(1.0 + calibration.matmul_half_size / sizes, axis=1)
    if calibration.unaligned_efficiency < 1.0 and aligned_elements > 1:
        whole = np.rint(sizes)
        unaligned = ((whole % aligned_elements != 0) & (whole > aligned_elements)).any(axis=1)
        share = share * np.where(unaligned, calibration.unaligned_efficiency, 1.0)
    return share


def attention_share(width: np.ndarray, keys: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Return the share of the peak that a fused kernel reaches: heads so wide over so many keys a query.

    Like a product's: tiles are filled and drained along the keys, those on the border of a mask are half
    empty, and narrow heads leave a tile's products short beside its softmax.
    """
    ramps = (1.0 + calibration.attention_half_width / width) * (1.0 + calibration.attention_half_keys / keys)
    return calibration.attention_efficiency / ramps


def _by_group(
    profile: ProgramTables,
    placement: Placement,
    chip: Chip,
    dtype: str,
    calibration: Calibration,
    kernel: str,
    once: np.ndarray,
    backward: np.ndarray,
) -> None:
    """Put what experts take by `kernel` in `once` [M], in `backward` [M] their gradients over it."""
    products = profile.products
    chosen = np.flatnonzero(products.grouped)
    if not len(chosen):
        return
    sizes = np.maximum(products.role_sizes[chosen] * placement.fractions.roles[chosen], 1.0)
    peak = peak_flops(chip, dtype) * product_share(sizes[:, 1:], calibration)
    item = 4 if dtype.startswith("float32") else 2
    for n, (groups, rows, columns, contraction), reached in zip(chosen, sizes, peak, strict=True):
        work = GroupedWork(
            groups=groups, rows=rows, columns=columns, contraction=contraction, item_bytes=item
        )
        found = grouped_seconds(work, kernel, chip, calibration, reached)
        once[n] = found.product
        backward[n] *= (found.of_rows + found.of_matrices) / (2.0 * found.product)


def _products(
    profile: ProgramTables,
    seconds_of_one: np.ndarray,
    backward: np.ndarray,
    kernel: FusedAttention | None,
    calibration: Calibration,
    attended: Mapping[int, AttendedSeconds],
    seconds: np.ndarray,
    kernels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    products, steps = profile.products, profile.steps
    equation = products.equation
    section, runs, core = steps.section[equation], steps.runs[equation], steps.core[equation]
    once = seconds_of_one * runs
    # One product of the forward pass is one for each operand's gradient, of as many flops.
    if kernel is not None:
        masked = kernel.of("masked", products.call)[core]
        backward[core] *= kernel.of("gradient", products.call)[core] / 2.0
        once[core] *= 1.0 - masked + masked / calibration.masked_efficiency
        _as_attended(products, attended, once, backward)
    for kind, chosen in ((0, ~core), (1, core)):
        for n, times in enumerate((1.0, backward)):
            seconds[n, kind] += _by_section(section, once * times * chosen)
    # A fused kernel carries out two products, scores and their sum with values.
    launched = np.where(core & (kernel is not None), 0.5, 1.0) * runs
    for n, times in enumerate((1.0, products.gradients)):
        kernels[n] += _by_section(section, launched * times)
    return once, once * backward, launched


def _as_attended(
    products: Products,
    attended: Mapping[int, AttendedSeconds],
    once: np.ndarray,
    backward: np.ndarray,
) -> None:
    """Put the seconds of `attended` calls in `once` [M], in `backward` [M] their gradients' over these."""
    for index, own in attended.items():
        mine = products.call == index
        once[mine] = own.forward * products.call_runs[mine] / max(int(mine.sum()), 1)
        backward[mine] = own.backward / own.forward * (products.gradients[mine] > 0)


def _kernels(
    profile: ProgramTables,
    placement: Placement,
    bytes_per_second: float,
    kernel: FusedAttention | None,
    seconds: np.ndarray,
    kernels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    groups = profile.groups
    if not len(groups.section):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    size = profile.values.bytes * placement.value_fraction
    moved = size[groups.edge_value] / bytes_per_second
    # What fused attention does not write to memory costs nothing beyond its kernel.
    here = np.ones(len(groups.core), bool) if kernel is None else ~groups.core
    runs = groups.runs * here
    count = len(groups.section)
    forward = np.bincount(groups.edge_group, weights=moved * groups.edge_forward, minlength=count) * runs
    backward = np.bincount(groups.edge_group, weights=moved * groups.edge_backward, minlength=count) * runs
    for n, amount in enumerate((forward, backward)):
        seconds[n, 2] += _by_section(groups.section, amount)
    for n, times in enumerate((1.0, backward > 0)):
        kernels[n] += _by_section(groups.section, runs * times)
    return forward, backward, runs
