"""The Estimate against our own training steps on one H200: `python benchmarks/own_runs.py [--runs CSV]`.

The rows are measured/own_gpu_runs.csv: whole steps of this repository's models, and, at the same shape, of
plain JAX and of PyTorch (`reference`). Each of ours is planned as it ran (batch, sequence, rematerialisation,
microbatches) for one card, which need not be here. Printed are the seconds of a step and the peak bytes of
the device, measured and estimated; of references what was measured; at the end the median absolute errors.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
from measured.rows import csv_file
from meshwright.models import decoder, preset
from meshwright.sharding import plan

_RUNS = Path(__file__).parent / "measured" / "own_gpu_runs.csv"
_BATCH = ("tokens", "targets", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run; a reference has no estimate."""

    name: str
    measured_seconds: float
    measured_bytes: float
    estimated_seconds: float | None = None
    estimated_bytes: float | None = None


def estimated(row: Mapping[str, str]) -> Row:
    """Return a row of the file with the Estimate of its plan."""
    measured = Row(
        name=row["name"],
        measured_seconds=float(row["measured_step_seconds"]),
        measured_bytes=float(row["measured_peak_bytes"]),
    )
    if row["notes"] == "reference":
        return measured
    model = decoder(preset(row["preset"], **dict(word.split("=") for word in row["overrides"].split())))
    rows, sequence = int(row["batch"]), int(row["sequence"])
    made = plan(
        model.loss,
        jax.eval_shape(model.init, jax.random.key(0)),
        {key: jax.ShapeDtypeStruct((rows, sequence), "int32") for key in _BATCH},
        topology=f"{row['device'].lower()}:1",
        optimizer=optax.adamw(3e-4),
        names=model.names,
        remat=row["remat"],
        microbatches=int(row["microbatches"]),
    )
    assert made.estimate is not None
    return dataclasses.replace(
        measured,
        estimated_seconds=made.estimate.step_seconds,
        estimated_bytes=made.estimate.peak_bytes,
    )


def show(row: Row) -> None:
    """Print a row."""
    line = f"{row.name:32} {row.measured_seconds:8.3f} s"
    if row.estimated_seconds is None or row.estimated_bytes is None:
        print(f"{line} {'reference':>17}  {row.measured_bytes / 2**30:7.1f} GiB")
        return
    seconds = row.estimated_seconds / row.measured_seconds - 1.0
    held = row.estimated_bytes / row.measured_bytes - 1.0
    print(
        f"{line} {row.estimated_seconds:8.3f} {seconds:+7.1%}  {row.measured_bytes / 2**30:7.1f} GiB "
        f"{row.estimated_bytes / 2**30:7.1f} {held:+7.1%}"
    )


def summary(rows: list[Row]) -> dict[str, float]:
    """Return the median absolute errors of what has an estimate."""
    own = [row for row in rows if row.estimated_seconds and row.estimated_bytes]
    return {
        "rows": len(own),
        "step_seconds": statistics.median(
            abs((row.estimated_seconds or 0.0) / row.measured_seconds - 1.0) for row in own
        ),
        "peak_bytes": statistics.median(
            abs((row.estimated_bytes or 0.0) / row.measured_bytes - 1.0) for row in own
        ),
    }


def main(arguments: list[str]) -> int:
    """Print every row and the medians, or all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=csv_file, default=_RUNS, help="another file of such rows")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    with given.runs.open(newline="") as file:
        rows = [estimated(row) for row in csv.DictReader(file)]
    if given.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "summary": summary(rows)}))
        return 0
    print(f"{'':32} {'measured':>10} {'estimated':>17}  {'measured':>11} {'estimated':>15}")
    for row in rows:
        show(row)
    print({key: round(value, 3) for key, value in summary(rows).items()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
