"""Score the cost model by runs that others measured, under the frameworks that they ran in.

`python benchmarks/accuracy.py [--runs CSV] [--sweeps CSV] [--layouts CSV] [--calibration TOML] [--json]`

The rows are other people's and not in this repository: the paths say where they are (benchmarks/measured
says which columns they have). What a clean checkout can score is in own_runs.py and compiled.py.

Each row's architecture is built as a decoder and traced once; its layout is priced as it stands. Prints,
for each source, the median and mean absolute relative error of the step time and the median error of the
peak memory; the rank correlation and the regret within each cell of five or more completed layouts; the ten
worst rows; what cannot be expressed, with the reason; and hand-tuned layouts beside the planner's own.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import tuned
from frameworks.execution import execution_of
from frameworks.record import Framework, record_for
from measured.layouts import candidate
from measured.programs import traced
from measured.rows import csv_file, load
from measured.run import Run
from meshwright.sharding.cost import Estimate, Pricer


def record_of(run: Run, path: Path | None = None) -> Framework:
    """Return the record of `run`'s framework on its chip, the shipped one or that of a file."""
    return record_for(run.topology.chip.name, run.framework["calibration"], path)


def pricer(run: Run, record: Framework | None = None) -> Pricer:
    """Return what prices the layouts of `run`'s program on its topology, by the shipped record if none."""
    record, facts = record_of(run) if record is None else record, run.framework
    return Pricer(
        traced(run.architecture)[1],
        run.topology,
        optimizer_slots=facts["optimizer_bytes"],
        gradient_bytes=facts["gradient_bytes"],
        dtype=run.dtype,
        calibration=record,
        execution=execution_of(record, run.topology),
    )


def estimate(run: Run, record: Framework | None = None) -> Estimate:
    """Return the estimate of a measured row."""
    return pricer(run, record).price(candidate(run, traced(run.architecture)[0]))


def score(runs: list[Run], estimates: list[Estimate]) -> dict[str, Any]:
    """Return the scores by source, by cell, and the worst rows."""
    by_source: dict[str, list[tuple[Run, Estimate]]] = collections.defaultdict(list)
    by_cell: dict[tuple[str, ...], list[tuple[Run, Estimate]]] = collections.defaultdict(list)
    for pair in zip(runs, estimates, strict=True):
        by_source[pair[0].source].append(pair)
        by_cell[(pair[0].source, *pair[0].cell)].append(pair)
    sources = {source: _errors(pairs) for source, pairs in by_source.items()}
    cells = {" ".join(cell[1:]): found for cell, pairs in by_cell.items() if (found := choice(pairs))}
    worst = sorted(zip(runs, estimates, strict=True), key=lambda pair: -(_error(*pair) or 0.0))[:10]
    return {
        "sources": {source: found for source, found in sources.items() if found},
        "cells": cells,
        "choices": _choices(by_cell),
        "summary": _summary(sources, cells) | _spread(runs) | _inverted(runs),
        "worst": [
            {
                "run": run.label,
                "source": run.source,
                "measured_seconds": run.seconds,
                "predicted_seconds": guess.step_seconds,
                "time": dict(guess.time),
            }
            for run, guess in worst
        ],
    }


def _choices(by_cell: dict[tuple[str, ...], list[tuple[Run, Estimate]]]) -> dict[str, dict[str, float]]:
    """Return source → how well layouts are chosen and ranked in its cells."""
    found: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    for cell, pairs in by_cell.items():
        if row := choice(pairs):
            found[cell[0]].append(row)
    return {
        source: {
            "cells": len(rows),
            "regret_median": float(np.median([row["regret"] for row in rows])),
            "regret_worst": float(np.max([row["regret"] for row in rows])),
            "spearman_median": float(np.median([row["spearman"] for row in rows])),
            "spearman_least": float(np.min([row["spearman"] for row in rows])),
        }
        for source, rows in found.items()
    }


def _error(run: Run, guess: Estimate) -> float | None:
    return None if run.seconds is None else abs(guess.step_seconds / run.seconds - 1.0)


def _errors(pairs: list[tuple[Run, Estimate]]) -> dict[str, float]:
    found = [error for pair in pairs if (error := _error(*pair)) is not None]
    if not found:
        return {}
    memory = [abs(g.peak_bytes / r.peak_bytes - 1.0) for r, g in pairs if r.peak_bytes]
    signed = [np.log(g.step_seconds / r.seconds) for r, g in pairs if r.seconds]
    row = {
        "rows": len(found),
        "median": float(np.median(found)),
        "mean": float(np.mean(found)),
        "bias": float(np.exp(np.median(signed)) - 1.0),
    }
    if memory:
        row |= {"memory_rows": len(memory), "memory_median": float(np.median(memory))}
    return row


def choice(pairs: list[tuple[Run, Estimate]], usable: float | None = None) -> dict[str, float] | None:
    """Return how well a cell's layouts are ranked and chosen; None with fewer than five that completed.

    `usable` is the share of a device's memory that a layout may take, that of the shipped calibration by
    default.
    """
    done = [(r.seconds, g.step_seconds) for r, g in pairs if r.seconds is not None]
    if len(done) < 5:
        return None
    measured, predicted = np.array(done).T
    first = pairs[0][0]
    if usable is None:
        usable = record_of(first).usable_memory
    capacity = (first.topology.chip.hbm_bytes or np.inf) * usable
    fits = [pair for pair in pairs if pair[1].peak_bytes <= capacity]
    chosen = min(fits or pairs, key=lambda pair: pair[1].step_seconds if fits else pair[1].peak_bytes)[0]
    regret = chosen.seconds / measured.min() - 1.0 if chosen.seconds else float("inf")
    return {
        "layouts": len(pairs),
        "completed": len(done),
        "spearman": float(np.corrcoef(_ranks(measured), _ranks(predicted))[0, 1]),
        "regret": float(regret),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[inverse]


def _summary(
    sources: dict[str, dict[str, float]], cells: dict[str, dict[str, float]]
) -> dict[str, float | int]:
    rows = [row for row in sources.values() if row]
    ranks = [cell["spearman"] for cell in cells.values()]
    regrets = [cell["regret"] for cell in cells.values()]
    memory = [row["memory_median"] for row in rows if "memory_median" in row]
    found: dict[str, float | int] = {"sources": len(rows)}
    if rows:
        found["median_over_sources"] = float(np.median([row["median"] for row in rows]))
        found["mean_over_sources"] = float(np.mean([row["mean"] for row in rows]))
    if memory:
        found["memory_median_over_sources"] = float(np.median(memory))
    if ranks:
        found |= {
            "cells": len(ranks),
            "spearman_median": float(np.median(ranks)),
            "spearman_least": float(np.min(ranks)),
            "regret_median": float(np.median(regrets)),
            "regret_worst": float(np.max(regrets)),
            "misses": sum(not np.isfinite(regret) for regret in regrets),
        }
    return found


def _spread(runs: list[Run]) -> dict[str, float | int]:
    """Return by how much rows differ that state the same layout of the same cell: no model orders those."""
    alike: dict[str, list[float]] = collections.defaultdict(list)
    for run in runs:
        if run.seconds is not None:
            key = (run.cell, sorted(run.layout.items(), key=repr), run.framework["calibration"], run.dtype)
            alike[repr(key)].append(run.seconds)
    spreads = [max(times) / min(times) - 1.0 for times in alike.values() if len(times) > 1]
    if not spreads:
        return {}
    return {
        "equal_layouts": len(spreads),
        "equal_layouts_spread_median": float(np.median(spreads)),
        "equal_layouts_spread_worst": float(np.max(spreads)),
    }


def _inverted(runs: list[Run]) -> dict[str, float | int]:
    """Return how often a layout takes less time for a larger batch, as no model says in which work costs.

    Pairs of rows are alike in everything but the sequences of a microbatch; those are counted.
    """
    alike: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for run in runs:
        if run.seconds is not None:
            key = (run.source, run.cell[:3], run.cell[4], sorted(run.layout.items(), key=repr), run.dtype)
            alike[repr(key)].append((run.architecture.batch, run.seconds))
    pairs = [
        fewer[1] / more[1] - 1.0
        for rows in alike.values()
        for fewer, more in itertools.combinations(sorted(rows), 2)
        if fewer[0] < more[0]
    ]
    if not pairs:
        return {}
    return {
        "larger_batches": len(pairs),
        "larger_batches_faster": sum(pair > 0.0 for pair in pairs),
        "larger_batches_faster_worst": float(max(max(pairs), 0.0)),
    }


def show(name: str, scores: dict[str, Any], left: list[tuple[str, str, str]]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    table = Table("source", "rows", "median %", "mean %", "bias %", "memory %", title=f"{name}: step time")
    for source, row in sorted(scores["sources"].items(), key=lambda item: -item[1]["rows"]):
        memory = f"{100 * row['memory_median']:.0f}" if "memory_median" in row else ""
        figures = (f"{100 * row[key]:.1f}" for key in ("median", "mean", "bias"))
        table.add_row(source[:90], str(row["rows"]), *figures, memory)
    console.print(table)
    if scores["cells"]:
        table = Table("cell", "layouts", "ran", "Spearman", "regret %", title=f"{name}: choice within cells")
        for cell, row in scores["cells"].items():
            regret = "did not run" if not np.isfinite(row["regret"]) else f"{100 * row['regret']:.1f}"
            table.add_row(
                cell[:90], str(row["layouts"]), str(row["completed"]), f"{row['spearman']:.2f}", regret
            )
        console.print(table)
    for source, row in scores["choices"].items():
        figures = ", ".join(f"{key} {value:.3g}" for key, value in row.items())
        console.print(f"{source[:60]}: {figures}")
    table = Table("worst rows", "measured s", "predicted s", "largest items", title=name)
    for row in scores["worst"]:
        items = sorted(row["time"].items(), key=lambda item: -item[1])[:3]
        text = ", ".join(f"{key} {value:.3g}" for key, value in items)
        measured = f"{row['measured_seconds']:.3f}" if row["measured_seconds"] else "-"
        table.add_row(row["run"], measured, f"{row['predicted_seconds']:.3f}", text)
    console.print(table)
    console.print({key: round(value, 4) for key, value in scores["summary"].items()})
    reasons = collections.Counter(reason for *_, reason in left)
    for reason, count in reasons.most_common():
        console.print(f"not expressible: {count} rows: {reason}")


def main(arguments: list[str]) -> int:
    """Score the files that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=csv_file, help="training runs, one a row")
    parser.add_argument("--sweeps", type=csv_file, help="many layouts of the same model and cluster")
    parser.add_argument("--layouts", type=csv_file, help="layouts that people tuned by hand (tuned.py)")
    parser.add_argument("--calibration", type=Path, help="instead of benchmarks/frameworks/calibration.toml")
    parser.add_argument("--only", help="score sources that contain this text")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    files = {"runs": given.runs, "sweeps": given.sweeps, "layouts": given.layouts}
    if not any(files.values()):
        parser.error(
            "nothing to score: the rows are not in this repository; give --runs, --sweeps or --layouts"
        )
    report: dict[str, Any] = {}
    for name in ("runs", "sweeps"):
        path = files[name]
        if path is None:
            continue
        runs, left = load(path)
        runs = [run for run in runs if not given.only or given.only in run.source]
        scores = score(runs, [estimate(run, record_of(run, given.calibration)) for run in runs])
        report[name] = scores | {"not_expressible": [list(row) for row in left]}
        if not given.json:
            show(name, scores, left)
    if files["layouts"] is not None:
        report["layouts"] = tuned.score(files["layouts"])
        if not given.json:
            tuned.show(report["layouts"])
    if given.json:
        print(json.dumps(report, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
