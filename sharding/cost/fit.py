"""Fit the few efficiencies of a chip under a framework to runs that were measured."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

from .calibration import Calibration
from .candidate import Candidate
from .estimate import Pricer
from .exchange import Stored, stored
from .placement import Placement

# What may be fitted, with the least and the most that it can be.
RANGES: dict[str, tuple[float, float]] = {
    "matmul_efficiency": (0.2, 1.0),
    "matmul_half_size": (1.0, 1024.0),
    "attention_efficiency": (0.03, 1.0),
    "memory_efficiency": (0.05, 1.0),
    "optimizer_efficiency": (0.02, 1.0),
    "kernel_seconds": (1e-7, 1e-4),
    "layer_seconds": (1e-6, 1e-1),
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
    "overlap_activations": (0.01, 0.95),
    "overlap_stages": (0.01, 1.0),
    "imbalance_per_doubling": (1e-4, 0.1),
}


# Steps of the first look over a field's range.
_COARSE = 6


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A candidate and the seconds that its step took; `weight` is how much it counts."""

    pricer: Pricer
    candidate: Candidate
    seconds: float
    weight: float = 1.0

    @functools.cached_property
    def _placed(self) -> tuple[Placement, Stored, dict[str, float]]:
        """What no calibration of times changes."""
        placement = self.pricer.place(self.candidate)
        lying = stored(self.pricer.profile, self.candidate)
        return placement, lying, self.pricer.memory(self.candidate, placement, lying)

    def predicted(self, calibration: Calibration) -> float:
        """Return the step's seconds under `calibration`."""
        return sum(self.pricer.time(self.candidate, *self._placed, calibration).values())


def error(runs: Sequence[Measured], calibration: Calibration) -> float:
    """Return the weighted mean of |log(predicted / measured)|."""
    total = sum(run.weight for run in runs)
    return sum(run.weight * abs(math.log(run.predicted(calibration) / run.seconds)) for run in runs) / total


def calibrate(
    runs: Sequence[Measured], start: Calibration, names: Iterable[str] | None = None, rounds: int = 8
) -> Calibration:
    """Return `start` with the fields `names` fitted to `runs` by a search along one field at a time.

    Few runs cannot tell many fields apart: give as many names as the runs vary in. The error is of the
    logarithm and absolute, so that a run that went wrong pulls no more than any other.
    """
    chosen = list(RANGES if names is None else names)
    best, lowest = start, error(runs, start)
    steps = dict.fromkeys(chosen, 0.5)
    for name in chosen if rounds else ():
        # Anywhere in its range first: a field far from where it matters has no slope to follow.
        least, most = RANGES[name]
        for part in range(_COARSE + 1):
            value = least * (most / least) ** (part / _COARSE)
            tried = dataclasses.replace(best, **{name: value})
            found = error(runs, tried)
            if found < lowest - 1e-4:
                best, lowest = tried, found
    for _ in range(rounds):
        for name in chosen:
            least, most = RANGES[name]
            before = lowest
            for direction in (1.0, -1.0):
                value = max(getattr(best, name), least) * math.exp(direction * steps[name])
                tried = dataclasses.replace(best, **{name: min(max(value, least), most)})
                found = error(runs, tried)
                if found < lowest - 1e-6:
                    best, lowest = tried, found
                    break
            steps[name] = min(1.0, steps[name] * 1.3) if lowest < before else steps[name] * 0.5
    return best


def usable_memory(runs: Sequence[tuple[float, bool]]) -> float:
    """Return the share of a device's memory that tells runs that went well from those that did not.

    `runs` are (predicted share of the memory, whether it went well); shares from 0.8 to 1 are looked at.
    """

    def wrong(share: float) -> int:
        return sum((predicted <= share) != well for predicted, well in runs)

    return min((0.8 + 0.01 * n for n in range(21)), key=lambda share: (wrong(share), -share))


def calibrate_memory(pairs: Sequence[tuple[float, float]], start: Calibration) -> Calibration:
    """Return `start` with the bytes that it does not count fitted to (counted, measured) pairs.

    measured = reserved + (1 + overhead) counted, by the median: least squares of relative errors whose
    weights take the outliers out.
    """
    import numpy as np

    counted, measured = np.array(pairs, float).T
    unit = float(measured.mean())
    table = np.stack([counted, np.full(len(counted), unit)], axis=1) / measured[:, None]
    weights = np.ones(len(counted))
    scale, offset = 1.0, 0.0
    for _ in range(30):
        scale, offset = np.linalg.lstsq(table * weights[:, None], weights, rcond=None)[0]
        if offset < 0.0:
            scale, offset = float(np.average(1.0 / table[:, 0], weights=weights**2)), 0.0
        weights = 1.0 / np.sqrt(np.maximum(np.abs(table @ (scale, offset) - 1.0), 0.02))
    if scale < 1.0:
        scale, offset = 1.0, max(0.0, float(np.median(measured - counted)) / unit)
    overhead, reserved = float(scale) - 1.0, float(offset) * unit
    return dataclasses.replace(start, memory_overhead=overhead, reserved_bytes=reserved)
