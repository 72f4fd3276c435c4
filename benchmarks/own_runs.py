"""The Estimate against our own training steps on one H200: `python benchmarks/own_runs.py`.

The rows are measured/own_gpu_runs.csv: whole steps of this repository's models, and, at the same shape, of
plain JAX and of PyTorch (`reference`). Each of ours is planned as it ran (batch, sequence, rematerialisation,
microbatches, attention) for one card, which need not be here; with --verify it is compiled, too. Printed are
the seconds of a step and the peak bytes of the device, measured, estimated and compiled; of references what
was measured; at the end the median and the worst absolute errors.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import os
import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
import yaml
from measured.rows import csv_file
from meshwright.models import Model, decoder, preset
from meshwright.sharding import plan
from meshwright.sharding.program.jaxpr import RESULT_READ_TOO
from meshwright.sharding.verify.verify import verify

_RUNS = Path(__file__).parent / "measured" / "own_gpu_runs.csv"
_BATCH, _PACKED = ("tokens", "targets"), ("segment_ids", "positions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One run; a reference has no estimate."""

    name: str
    measured_seconds: float
    measured_bytes: float
    jax: str
    estimated_seconds: float | None = None
    estimated_bytes: float | None = None
    compiled_seconds: float | None = None
    compiled_bytes: float | None = None


@functools.cache
def _model(name: str, overrides: str) -> tuple[Model, Any]:
    """Return a preset's model with a row's overrides, and the shapes of its parameters."""
    words = (word.split("=") for word in overrides.split() if "=" in word)
    changed = {key: yaml.safe_load(value) for key, value in words}
    model = decoder(preset(name, **({"compute_dtype": "bfloat16"} | changed)))
    return model, jax.eval_shape(model.init, jax.random.key(0))


def estimated(row: Mapping[str, str], *, compiled: bool = False, calibration: Path | None = None) -> Row:
    """Return a row of the file with the Estimate of its plan, and what the compiler makes of it.

    Args:
        row: Of the file; a reference has no estimate.
        compiled: Whether to ask the compiler too.
        calibration: File of efficiencies in place of the shipped record.
    """
    measured = Row(
        name=row["name"],
        measured_seconds=float(row["measured_step_seconds"]),
        measured_bytes=float(row["measured_peak_bytes"]),
        jax=row["jax"],
    )
    if row["notes"] == "reference":
        return measured
    model, params = _model(row["preset"], row["overrides"])
    shape = int(row["batch"]), int(row["sequence"])
    # What a row calls its kernel, and whether its batch had segments.
    kernel, packed = row["attention"].split(",")[0].strip(), "no segments" not in row["attention"]
    batch = {key: jax.ShapeDtypeStruct(shape, "int32") for key in (*_BATCH, *(_PACKED if packed else ()))}
    optimizer = optax.adamw(3e-4)
    most = re.search(r"(\d+) segments", row["attention"])
    remat, *names = row["remat"].split()
    made = plan(
        model.loss,
        params,
        batch,
        topology=f"{row['device'].lower()}:1",
        optimizer=optimizer,
        names=model.names,
        remat=dict.fromkeys(names, "device") if remat == "keep" else remat,
        microbatches=int(row["microbatches"]),
        attention=kernel or None,
        segments=int(most[1]) if most else None,
        # Rows from before there was a choice say nothing of it.
        arithmetic="auto" if "arithmetic: auto" in row["notes"] else "jax",
        calibration=calibration,
    )
    assert made.estimate is not None
    found = dataclasses.replace(
        measured,
        estimated_seconds=made.estimate.step_seconds,
        estimated_bytes=made.estimate.peak_bytes,
    )
    proof = verify(made, model.loss, params, batch, optimizer).proof if compiled else None
    if proof is None:
        return found
    return dataclasses.replace(found, compiled_seconds=proof.step_seconds, compiled_bytes=proof.peak_bytes)


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
        f"{_compiled(row)}"
    )


def _compiled(row: Row) -> str:
    if row.compiled_seconds is None or row.compiled_bytes is None:
        return ""
    seconds = row.compiled_seconds / row.measured_seconds - 1.0
    held = row.compiled_bytes / row.measured_bytes - 1.0
    return (
        f"   compiled {row.compiled_seconds:8.3f} s {seconds:+7.1%} "
        f"{row.compiled_bytes / 2**30:7.1f} GiB {held:+7.1%}"
    )


def summary(rows: list[Row]) -> dict[str, float]:
    """Return the median and the worst absolute errors of what has an estimate, and of what was compiled."""
    own = [row for row in rows if row.estimated_seconds and row.estimated_bytes]
    found: dict[str, float] = {"rows": len(own)}
    figures = {
        "step_seconds": ("estimated_seconds", "measured_seconds"),
        "peak_bytes": ("estimated_bytes", "measured_bytes"),
        "compiled_step_seconds": ("compiled_seconds", "measured_seconds"),
        "compiled_peak_bytes": ("compiled_bytes", "measured_bytes"),
    }
    for name, (said, true) in figures.items():
        pairs = [(getattr(row, said), getattr(row, true)) for row in own]
        errors = [abs(one / other - 1.0) for one, other in pairs if one is not None]
        if errors:
            found |= {name: statistics.median(errors), f"{name}_worst": max(errors)}
    return found


def main(arguments: list[str]) -> int:
    """Print every row and the medians, or all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=csv_file, default=_RUNS, help="another file of such rows")
    parser.add_argument("--verify", action="store_true", help="compile each, about half a minute a row")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    with given.runs.open(newline="") as file:
        rows = [estimated(row, compiled=given.verify) for row in csv.DictReader(file)]
    if given.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "summary": summary(rows)}))
        return 0
    print(f"{'':32} {'measured':>10} {'estimated':>17}  {'measured':>11} {'estimated':>15}")
    for row in rows:
        show(row)
    print({key: round(value, 3) for key, value in summary(rows).items()})
    ran = sorted({row.jax for row in rows if row.jax} - {jax.__version__})
    if ran and (given.verify or RESULT_READ_TOO):
        more = ", which keep an array less for gelu" if RESULT_READ_TOO else ""
        print(f"estimated and compiled for JAX {jax.__version__}; the rows ran under {', '.join(ran)}{more}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
