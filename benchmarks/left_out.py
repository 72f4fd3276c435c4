"""How well a record prices a run of ours that it was not made with: `python benchmarks/left_out.py`.

The rows are those of `own_runs.py`, and of the references those in plain JAX, which are priced as our own
step of that shape without segments. For each row the efficiencies below are fitted to all others, from what
was known before any of them ran, and the row's step is priced by them. Printed are the seconds measured and
priced, and the median and worst absolute errors; beside them those of the shipped record, and of what was
known before.

Known before, each to a factor (`_BEFORE`): products reach what large ones of vendors' libraries sustain on
H100 and H200; memory what copies reach; attention's level and what a mask costs it are loosely those of
published kernels. The author of nanoGPT (February 2023) said that padding a vocabulary of 50,257 to 50,304
made a step of GPT-2 of this size a quarter faster: a fifth of the step, beside a head of 29 % of its
products, is 0.54 of an aligned product's rate.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import own_runs
from measured.rows import csv_file
from meshwright.sharding.cost.calibration import Calibration, calibration_for
from meshwright.sharding.cost.measured import Measurement, save
from scipy.optimize import least_squares

_RUNS = Path(__file__).parent / "measured" / "own_gpu_runs.csv"
# Efficiency → value before any run, and the factor within which it is known.
_KNOWN = {
    "matmul_efficiency": (0.8, 1.1),
    "float32_efficiency": (0.8, 1.2),
    "unaligned_efficiency": (0.54, 1.5),
    "memory_efficiency": (0.85, 1.15),
    "attention_efficiency": (0.65, 1.3),
    "masked_efficiency": (0.7, 1.5),
}
# Those that a record has.
_BEFORE = {field: known for field, known in _KNOWN.items() if hasattr(Calibration, field)}
# Efficiencies that divide the same seconds.
_SHARED = (
    ("matmul_efficiency", "float32_efficiency"),
    ("matmul_efficiency", "unaligned_efficiency"),
    ("attention_efficiency", "masked_efficiency"),
)
_PAIRS = [pair for pair in _SHARED if _BEFORE.keys() >= set(pair)]
# Of each kernel by itself.
_KERNELS = ("attention_efficiency", "masked_efficiency")
# The optimizer is elementwise work over the same memory.
_ALIKE = {"optimizer_efficiency": "memory_efficiency"}
# How far a step's seconds are from any model's by chance.
_NOISE = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run whose seconds are a sum of weights over products of efficiencies; `weights` by their fields."""

    name: str
    seconds: float
    weights: Mapping[frozenset[str], float]
    shipped: Mapping[str, float]

    def priced(self, efficiencies: Mapping[str, float]) -> float:
        """Return the step's seconds by other efficiencies."""
        return sum(
            weight / np.prod([efficiencies[field] for field in fields])
            for fields, weight in self.weights.items()
        )


def run_of(row: Mapping[str, str]) -> Run:
    """Return a run of the file, priced several times to tell what of its seconds each efficiency divides.

    An efficiency of two fields (unaligned products, the masked part of attention) is told by doubling both.
    """
    kernel = row["attention"].split(",")[0].strip() or None
    shipped = calibration_for(row["device"].lower(), kernel)
    value = {field: getattr(shipped, field) for field in _BEFORE}

    def seconds(*doubled: str) -> float:
        changed = {field: value[field] * (2.0 if field in doubled else 1.0) for field in _BEFORE}
        changed |= {field: changed[like] for field, like in _ALIKE.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "record.json"
            save(Measurement(chip=row["device"].lower(), jax=row["jax"], efficiencies=changed), path)
            notes = row["notes"].replace("reference", "")
            found = own_runs.estimated({**row, "notes": notes}, calibration=path).estimated_seconds
        assert found is not None
        return found

    whole = seconds()
    # What doubling one field saves is half of all that it divides, alone and with another.
    alone = {field: 2.0 * (whole - seconds(field)) for field in _BEFORE}
    weights: dict[frozenset[str], float] = {}
    for one, other in _PAIRS:
        both = 4.0 * (seconds(one, other) - whole + (alone[one] + alone[other]) / 2.0)
        weights[frozenset((one, other))] = both
    shared = {field: sum(weight for pair, weight in weights.items() if field in pair) for field in _BEFORE}
    weights |= {frozenset([field]): alone[field] - shared[field] for field in _BEFORE}
    weights[frozenset()] = whole - sum(weights.values())
    return Run(
        name=row["name"],
        seconds=float(row["measured_step_seconds"]),
        weights={
            frozenset(_of(field, kernel) for field in fields): weight
            * float(np.prod([value[field] for field in fields]))
            for fields, weight in weights.items()
        },
        shipped={_of(field, kernel): value[field] for field in _BEFORE},
    )


def _of(field: str, kernel: str | None) -> str:
    return f"{field} of {kernel}" if field in _KERNELS else field


def fitted(runs: Sequence[Run], also: Iterable[str] = ()) -> dict[str, float]:
    """Return the efficiencies that `runs` tell, beside what was known before them, those of `also` too."""
    names = sorted({name for run in runs for fields in run.weights for name in fields} | set(also))
    known = np.log([_BEFORE[name.partition(" of ")[0]][0] for name in names])
    width = np.log([_BEFORE[name.partition(" of ")[0]][1] for name in names])

    def efficiencies(point: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.exp(point).tolist(), strict=True))

    def wrong(point: np.ndarray) -> np.ndarray:
        record = efficiencies(point)
        errors = [np.log(run.priced(record) / run.seconds) / _NOISE for run in runs]
        return np.concatenate([errors, (point - known) / width])

    return efficiencies(least_squares(wrong, known).x)


def main(arguments: list[str]) -> int:
    """Print each row by the record of all others, and by the shipped one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=csv_file, default=_RUNS, help="another file of such rows")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    with given.runs.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["jax"]]
    runs = [run_of(row) for row in rows]
    told = []
    for place, run in enumerate(runs):
        others = fitted([other for k, other in enumerate(runs) if k != place], run.shipped)
        before = {name: _BEFORE[name.partition(" of ")[0]][0] for name in run.shipped}
        said = {
            "left_out": run.priced(others),
            "shipped": run.priced(run.shipped),
            "before": run.priced(before),
        }
        own = {name: others[name] for name in run.shipped}
        told.append({"name": run.name, "measured": run.seconds, **said, "efficiencies": own})
    if given.json:
        print(json.dumps(told))
        return 0
    for one in told:
        print(
            f"{one['name']:32} {one['measured']:.3f} s",
            *(f"{kind} {one[kind]:.3f} {one[kind] / one['measured'] - 1.0:+.1%} " for kind in _KINDS),
            " ".join(
                f"{field.removesuffix('_efficiency')}={v:.2f}" for field, v in one["efficiencies"].items()
            ),
        )
    for kind in _KINDS:
        errors = [abs(one[kind] / one["measured"] - 1.0) for one in told]
        print(f"{kind}: median {statistics.median(errors):.1%}, worst {max(errors):.1%} of {len(errors)}")
    return 0


_KINDS = ("left_out", "shipped", "before")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
