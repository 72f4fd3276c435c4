"""Score rows that nothing was fitted to: `python benchmarks/held_out.py --runs CSV --sweeps CSV [--folds N]`.

The rows are other people's and not in this repository: the paths say where they are. `--only CHIP.FRAMEWORK`
looks at a part of them.

The cells (model, chip, devices, batch, sequence) of each sweep are dealt into folds. For each, a record
is fitted to everything else of its chip and framework, from a start that knows no measured run, and the
cells left out are scored: error of step time and of peak memory, rank and regret.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
from typing import Any

import numpy as np
from accuracy import choice, estimate
from calibrate import group, groups, measured, with_limit, with_memory
from frameworks.fit import RANGES, calibrate
from frameworks.record import Framework, plain, record_for
from measured.rows import csv_file, load
from measured.run import Run
from meshwright.sharding.cost import Estimate


def neutral(chip: str, framework: str) -> Framework:
    """Return the facts of a framework with efficiencies that no run was fitted to.

    A share lies in the middle of what is possible; seconds, where something shows of them: at their least,
    a fit sees no slope.
    """
    known, default = record_for(chip, framework), plain("default")
    middle = {name: getattr(default, name) for name in RANGES}
    for name, (low, high) in RANGES.items():
        if name.endswith("_seconds"):
            middle[name] = math.sqrt(low * high)
        elif name.startswith("overlap"):
            middle[name] = (low + high) / 2.0
    return dataclasses.replace(known, **middle, memory_overhead=0.0, reserved_bytes=0.0, usable_memory=0.94)


def folds(runs: list[Run], swept: set[tuple[str, ...]], count: int) -> list[set[tuple[str, ...]]]:
    """Return the cells of each fold, the same in every run of this script."""
    cells = sorted({run.cell for run in runs if (run.source, *run.cell) in swept})
    random.Random(0).shuffle(cells)
    return [set(cells[n::count]) for n in range(count) if cells[n::count]]


def held_out(
    chip: str, framework: str, runs: list[Run], swept: set[tuple[str, ...]], count: int
) -> list[dict[str, float]]:
    """Return the scores of each cell by a record that has seen none of its rows."""
    start = neutral(chip, framework)
    names = [name for name in RANGES if start.fused_attention or name != "attention_efficiency"]
    found = []
    for left in folds(runs, swept, count):
        seen = [run for run in runs if run.cell not in left]
        fitted = calibrate(measured([run for run in seen if run.seconds is not None]), start, names)
        fitted = with_limit(seen, with_memory(seen, fitted))
        for cell in sorted(left):
            rows = [run for run in runs if run.cell == cell]
            found.append(_scores([(run, estimate(run, fitted)) for run in rows], fitted))
    return [row for row in found if row]


def _scores(pairs: list[tuple[Run, Estimate]], fitted: Framework) -> dict[str, float]:
    cell = choice(pairs, fitted.usable_memory)
    if cell is None:
        return {}
    time = [abs(guess.step_seconds / run.seconds - 1.0) for run, guess in pairs if run.seconds]
    memory = [abs(guess.peak_bytes / run.peak_bytes - 1.0) for run, guess in pairs if run.peak_bytes]
    return cell | {"time": float(np.median(time)), "memory": float(np.median(memory or [np.nan]))}


def main(arguments: list[str]) -> int:
    """Print a line for each sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=csv_file, required=True, help="training runs, one a row")
    parser.add_argument("--sweeps", type=csv_file, required=True, help="many layouts of a model and cluster")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--only", default="")
    given = parser.parse_args(arguments)
    if given.folds < 2:
        parser.error(f"--folds {given.folds}: at least two, or nothing is left to fit to")
    sweeps = load(given.sweeps)[0]
    swept = {(run.source, *run.cell) for run in sweeps}
    everything = load(given.runs)[0] + sweeps
    for chip, framework in sorted(groups(sweeps)):
        if given.only not in f"{chip}.{framework}":
            continue
        runs = [run for run in everything if group(run) == (chip, framework)]
        rows = held_out(chip, framework, runs, swept, given.folds)
        if rows:
            print(f"{chip}.{framework}: {_line(rows)}", flush=True)
    return 0


def _line(rows: list[dict[str, Any]]) -> str:
    def of(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    ran = of("regret")[np.isfinite(of("regret"))]
    stated = of("memory")[np.isfinite(of("memory"))]
    memory = f"memory {100 * np.median(stated):.1f} %" if len(stated) else "memory not stated"
    return (
        f"{len(rows)} cells held out; step time {100 * np.median(of('time')):.1f} %, "
        f"{memory}, "
        f"Spearman {np.median(of('spearman')):.2f} (least {of('spearman').min():.2f}), "
        f"regret {100 * np.median(of('regret')):.1f} %, worst {100 * ran.max():.1f} %, "
        f"{len(rows) - len(ran)} did not run, {np.mean(of('regret') <= 0.01):.0%} within 1 %"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
