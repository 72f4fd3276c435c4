"""The Estimate against the real compiler: `python benchmarks/compiled.py [--only WORD] [--first] [--json]`.

Each cell of compiled_grid.toml is planned, compiled for its slice, which is not here, and read. Printed are
the peak memory of a device and the seconds of a step, estimated and compiled, and whether the planner's first
choice fits by the compiler's word. What was compiled before comes from the cache of proofs.
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

import jax
import optax
from meshwright.models import decoder, preset
from meshwright.sharding import UserError, plan
from meshwright.sharding.compiled.verify import Verdict, verify
from meshwright.sharding.planner.reasons import layout_in_words

_GRID = Path(__file__).with_name("compiled_grid.toml")
_BATCH = ("tokens", "targets", "segment_ids", "positions")
_GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled plan of the grid; `error` is (estimated - compiled) / compiled of the peak."""

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
        if only in f"{cell['model']} {cell['topology']}":
            for declared in cell["plans"]:
                if not first or not declared:
                    yield cell, declared


def measure(cell: Mapping[str, Any], declared: Mapping[str, Any]) -> Row:
    """Plan and compile one."""
    model = decoder(preset(cell["model"], compute_dtype="bfloat16"))
    init = jax.jit(model.init)
    params = jax.eval_shape(init, jax.random.key(0))
    batch = {key: jax.ShapeDtypeStruct((cell["rows"], cell["sequence"]), "int32") for key in _BATCH}
    optimizer = optax.adamw(3e-4)
    loss = jax.jit(model.loss)
    words = dict(declared)
    mesh = words.pop("mesh", None)
    made = plan(
        loss,
        params,
        batch,
        topology=cell["topology"],
        optimizer=optimizer,
        names=model.names,
        mesh=None if mesh is None else {"data": -1, **mesh} if "fsdp" in mesh else {"fsdp": -1, **mesh},
        **words,
    )
    verdict = verify(made, loss, params, batch, optimizer)
    return _row(cell, declared, made, verdict)


def _row(cell: Mapping[str, Any], declared: Mapping[str, Any], made: Any, verdict: Verdict) -> Row:
    proof = verdict.proof
    return Row(
        model=cell["model"],
        topology=cell["topology"],
        first_choice=not declared,
        layout=layout_in_words(made.mesh, made.remat, made.microbatches, made.saved),
        outcome=verdict.outcome,
        estimated_peak_bytes=made.estimate.peak_bytes,
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
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    rows = []
    start = time.perf_counter()
    if not words.json:
        print("model        topology      estimated compiled  error  step est. compiled  compile outcome")
    for cell, declared in cells(words.only, words.first):
        try:
            rows.append(measure(cell, declared))
        except UserError as error:
            print(f"{cell['model']} on {cell['topology']}, {declared}: {error}", file=sys.stderr)
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
