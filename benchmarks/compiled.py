"""The Estimate against the real compiler.

    python benchmarks/compiled.py [--only WORD] [--first] [--quick] [--json]

Each cell of compiled_grid.toml is planned, compiled for its slice, which is not here, and read. Printed are
the peak memory of a device and the seconds of a step, estimated and compiled, and whether the planner's first
choice fits by the compiler's word. What was compiled before comes from the cache of proofs. With `--quick`
programs for TPUs are read as they are scheduled, before machine code: `benchmarks/quick.py` says how near.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from meshwright.runtime.config import load
from meshwright.runtime.train import plan_config
from meshwright.sharding import UserError
from meshwright.sharding.verify.verify import verify
from meshwright.sharding.words import layout_in_words

_GRID = Path(__file__).with_name("compiled_grid.toml")
_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled plan of the grid; `error` is (estimated - compiled) / compiled of the peak.

    Of what is too large the compiler states what its heap would need, which is compared with what the
    estimate says of that.
    """

    model: str
    topology: str
    first_choice: bool
    layout: str
    outcome: str
    estimated_peak_bytes: float
    compiled_peak_bytes: float
    estimated_seconds: float
    compiled_seconds: float
    compile_seconds: float
    memory: Mapping[str, float]
    message: str = ""

    @property
    def error(self) -> float:
        """Relative error of the estimated peak."""
        return self.estimated_peak_bytes / self.compiled_peak_bytes - 1.0


def cells(only: str, first: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each cell of the grid with the declared parts of one of its plans."""
    for cell in tomllib.loads(_GRID.read_text())["cell"]:
        if only in f"{name_of(cell)} {cell['topology']}":
            for declared in cell["plans"]:
                if not first or not declared:
                    yield cell, declared


def name_of(cell: Mapping[str, Any]) -> str:
    """Return the model of a cell."""
    presets = (word.partition("=")[2] for word in cell.get("words", ()) if word.startswith("model.preset="))
    return next(presets, cell["config"])


def measure(cell: Mapping[str, Any], declared: Mapping[str, Any], quick: bool) -> Row:
    """Plan and compile one."""
    words = [f"topology={cell['topology']}", *cell.get("words", ())]
    for key, value in declared.items():
        if key == "mesh":
            value = {"data": -1, **value} if "fsdp" in value else {"fsdp": -1, **value}
        words.append(f"{key}={json.dumps(value)}")
    planned = plan_config(load(_CONFIGS / f"{cell['config']}.yaml", words))
    made, shapes = planned.plan, planned.shapes
    verdict = verify(made, shapes.loss, shapes.params, shapes.batch, planned.optimizer, quick=quick)
    proof = verdict.proof
    assert made.estimate is not None
    return Row(
        model=name_of(cell),
        topology=cell["topology"],
        first_choice=not declared,
        layout=layout_in_words(made.mesh, made.remat, made.microbatches, made.saved),
        outcome=verdict.outcome,
        estimated_peak_bytes=(
            made.estimate.needed_bytes if verdict.outcome == "out_of_memory" else made.estimate.peak_bytes
        ),
        compiled_peak_bytes=verdict.peak_bytes,
        estimated_seconds=made.estimate.step_seconds,
        compiled_seconds=0.0 if proof is None else proof.step_seconds,
        compile_seconds=0.0 if proof is None else proof.compile_seconds,
        memory=dict(made.estimate.memory),
        message=verdict.message,
    )


def line(row: Row) -> str:
    """Write a row for people."""
    peaks = f"{row.estimated_peak_bytes / _GIB:7.2f} {row.compiled_peak_bytes / _GIB:7.2f} GiB"
    error = f"{row.error:+7.1%}" if row.compiled_peak_bytes else "      -"
    times = f"{row.estimated_seconds:7.3f} {row.compiled_seconds:7.3f} s"
    chosen = "first choice" if row.first_choice else "declared"
    return (
        f"{row.model:12} {row.topology:12} {peaks} {error} {times} {row.compile_seconds:5.0f} s "
        f"{row.outcome:14} {chosen:12} {row.layout}"
    )


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return how near the estimates come, and how many first choices fit."""
    errors = [abs(row.error) for row in rows if row.compiled_peak_bytes]
    firsts = [row for row in rows if row.first_choice]
    return {
        "compiled": len(errors),
        "peak_error_median": statistics.median(errors) if errors else None,
        "peak_error_worst": max(errors, default=None),
        "first_choices": len(firsts),
        "first_choices_that_fit": sum(row.outcome == "fits" for row in firsts),
    }


def main() -> int:
    """Print a line for each plan and the summary, or all as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cells whose model and topology contain this")
    parser.add_argument("--first", action="store_true", help="the planner's first choices alone")
    parser.add_argument("--quick", action="store_true", help="programs for TPUs as they are scheduled")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    rows = []
    start = time.perf_counter()
    if not words.json:
        print("model        topology      estimated compiled  error  step est. compiled  compile outcome")
    for cell, declared in cells(words.only, words.first):
        try:
            rows.append(measure(cell, declared, words.quick))
        except UserError as error:
            print(f"{name_of(cell)} on {cell['topology']}, {declared}: {error}", file=sys.stderr)
            continue
        if not words.json:
            print(line(rows[-1]), flush=True)
    found = {**summary(rows), "seconds": time.perf_counter() - start}
    if words.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], **found}, indent=2))
    else:
        print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
