"""Fit the few efficiencies of a chip under a framework to runs that were measured."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from meshwright.sharding.cost import Candidate, Pricer
from meshwright.sharding.cost.exchange import StoredOver
from meshwright.sharding.cost.placement import Placement
from scipy.optimize import least_squares

from .execution import execution_of
from .record import Framework

# What may be fitted, with the least and the most that it can be.
RANGES: dict[str, tuple[float, float]] = {
    "matmul_efficiency": (0.2, 1.0),
    "matmul_half_size": (1.0, 1024.0),
    "unaligned_efficiency": (0.02, 1.0),
    "attention_efficiency": (0.03, 1.0),
    "loss_passes": (1.0, 10.0),
    "memory_efficiency": (0.05, 1.0),
    "optimizer_efficiency": (0.02, 1.0),
    "kernel_seconds": (1e-7, 1e-4),
    "layer_seconds": (1e-6, 1e-2),
    "microbatch_seconds": (1e-5, 1e-1),
    "step_seconds": (1e-4, 1.0),
    "fabric_efficiency": (0.05, 1.1),
    "fabric_group_exponent": (0.01, 1.0),
    "fabric_seconds": (1e-7, 1e-3),
    "network_efficiency": (0.02, 1.1),
    "network_seconds": (1e-7, 1e-3),
    "pipelined_starts": (1.0, 30.0),
    "overlap_parameters": (0.02, 1.0),
    "overlap_gradients": (0.02, 1.0),
    "overlap_shards": (0.02, 1.0),
    "overlap_activations": (0.01, 0.95),
    "overlap_stages": (0.01, 1.0),
    "imbalance_per_doubling": (1e-4, 0.1),
}


# A field is known beforehand to within this share of the logarithm of its range, a run's seconds to within
# _NOISE; a run so many times off that its logarithm is _GROSS says little more than that it went wrong.
_PRIOR_WIDTH = 1.0 / 8.0
_NOISE = 0.03
_GROSS = 0.5
# A logarithm's step by which slopes are taken, and the error below which a run pulls no harder.
_STEP = 0.05
_LEAST = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A candidate and the seconds that its step took; it counts like `weight` runs."""

    pricer: Pricer
    candidate: Candidate
    seconds: float
    weight: float = 1.0

    @functools.cached_property
    def _placed(self) -> tuple[Placement, StoredOver, dict[str, float]]:
        """What no efficiency changes."""
        placement = self.pricer.place(self.candidate)
        over = self.pricer.stored_over(self.candidate, placement)
        return placement, over, self.pricer.memory(self.candidate, placement, over)

    def predicted(self, record: Framework) -> float:
        """Return the step's seconds under `record`."""
        execution = execution_of(record, self.pricer.topology)
        return sum(self.pricer.time(self.candidate, *self._placed, record, execution).values())


def error(runs: Sequence[Measured], record: Framework) -> float:
    """Return the weighted mean of |log(predicted / measured)|."""
    total = sum(run.weight for run in runs)
    return sum(run.weight * abs(math.log(run.predicted(record) / run.seconds)) for run in runs) / total


def calibrate(
    runs: Sequence[Measured], start: Framework, names: Iterable[str] | None = None, rounds: int = 30
) -> Framework:
    """Return `start` with the fields `names` fitted to `runs`, together, in their logarithms.

    What is known beforehand (`start`, as loosely as a share of each field's range) counts like a few runs, so
    that few runs move only what they tell apart. The runs' errors are of logarithms and absolute, and gross
    ones fade out: a run that went wrong pulls less than any other. At most `rounds` points are tried.
    """
    chosen = list(RANGES if names is None else names)
    low, high = np.log(np.array([RANGES[name] for name in chosen]).T)
    known = np.clip(np.log([max(getattr(start, name), 1e-12) for name in chosen]), low, high)
    width = (high - low) * _PRIOR_WIDTH
    weights = np.array([run.weight for run in runs])

    def record(point: np.ndarray) -> Framework:
        return dataclasses.replace(start, **dict(zip(chosen, np.exp(point).tolist(), strict=True)))

    def wrong(point: np.ndarray) -> np.ndarray:
        trial = record(point)
        errors = [math.log(run.predicted(trial) / run.seconds) for run in runs]
        return np.concatenate([errors, (point - known) / width])

    def slopes(point: np.ndarray) -> np.ndarray:
        here = wrong(point)
        steps = np.where(point + _STEP <= high, _STEP, -_STEP)
        return np.stack(
            [
                (wrong(point + step * unit) - here) / step
                for step, unit in zip(steps, np.eye(len(point)), strict=True)
            ],
            axis=1,
        )

    def loss(squares: np.ndarray) -> np.ndarray:
        """Return what squared residuals count [3, residuals]: their loss and its first two derivatives.

        A run of weight w and error e counts 2 w g log(1 + e / g) / n, with g gross and n the noise; what was
        known beforehand counts its square. The second derivative of a loss that bends down is left out, which
        makes the steps those of reweighted squares (Triggs et al. 2000, section 4.3).
        """
        found = np.stack([squares, np.ones_like(squares), np.zeros_like(squares)])
        size = np.sqrt(squares[: len(runs)])
        found[0, : len(runs)] = 2.0 * weights / _NOISE * _GROSS * np.log1p(size / _GROSS)
        found[1, : len(runs)] = weights / _NOISE / (np.maximum(size, _LEAST) * (1.0 + size / _GROSS))
        return found

    fitted = least_squares(
        wrong, known, slopes, (low, high), loss=loss, x_scale="jac", max_nfev=rounds, ftol=1e-3
    )
    return record(fitted.x)


def usable_memory(runs: Sequence[tuple[float, bool]]) -> float:
    """Return the share of a device's memory that tells runs that went well from those that did not.

    `runs` are (predicted share of the memory, whether it went well); shares from 0.8 to 1 are looked at.
    """

    def wrong(share: float) -> int:
        return sum((predicted <= share) != well for predicted, well in runs)

    return min((0.8 + 0.01 * n for n in range(21)), key=lambda share: (wrong(share), -share))


def calibrate_memory(rows: Sequence[tuple[float, float, float]], start: Framework) -> Framework:
    """Return `start` with the bytes that it does not count fitted to (lasting, passing, measured) rows.

    measured = lasting + reserved + (1 + overhead) passing, where passing comes and goes within a step: by the
    median, least squares of relative errors whose weights take the outliers out.
    """
    lasting, passing, measured = np.array(rows, float).T
    unit = float(measured.mean())
    table = np.stack([passing, np.full(len(passing), unit)], axis=1) / measured[:, None]
    goal = 1.0 - (lasting + passing) / measured
    best, lowest = (0.0, 0.0), float("inf")
    # Neither is below zero: where one would be, the other alone is fitted.
    for chosen in ([0, 1], [0], [1]):
        weights = np.ones(len(passing))
        found = np.zeros(2)
        for _ in range(30):
            found = np.zeros(2)
            solved = np.linalg.lstsq(table[:, chosen] * weights[:, None], goal * weights, rcond=None)[0]
            found[chosen] = np.maximum(solved, 0.0)
            weights = 1.0 / np.sqrt(np.maximum(np.abs(table @ found - goal), 0.02))
        wrong = float(np.abs(table @ found - goal).mean())
        if wrong < lowest - 1e-6:
            best, lowest = (float(found[0]), float(found[1])), wrong
    return dataclasses.replace(start, memory_overhead=best[0], reserved_bytes=best[1] * unit)
