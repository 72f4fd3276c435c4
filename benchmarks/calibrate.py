"""Fit the frameworks' efficiencies: `python benchmarks/calibrate.py --runs CSV --sweeps CSV [--only WORD]`.

The rows are other people's and not in this repository: the paths say where they are. Starts from
frameworks/calibration.toml, fits one record for each (chip, framework) to measured runs and writes the file
again. Of a large source a fixed sample of rows is used. The product's own table is written by hand from what
was fitted here, from what compiled programs show, and from the sources that it names.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import random
import sys

from accuracy import estimate, pricer
from frameworks.fit import RANGES, Measured, calibrate, calibrate_memory, error, usable_memory
from frameworks.record import SHIPPED, Framework, Tables, plain, read, write
from measured.layouts import candidate
from measured.programs import traced
from measured.rows import csv_file, load
from measured.run import Run

_SAMPLE = 200
# A run so many times slower than predicted went wrong: near its limit an allocator thrashes.
_SLOW = 2.0
# A layout so much slower than the best of its cell counts less: a choice is among the fast ones.
_SLOWER = 0.5


def groups(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Return the completed runs of each (chip, framework)."""
    found: dict[tuple[str, str], list[Run]] = collections.defaultdict(list)
    for run in runs:
        if run.seconds is not None:
            found[group(run)].append(run)
    return found


def group(run: Run) -> tuple[str, str]:
    """Return the (chip, framework) that a run is counted with."""
    return run.topology.chip.name, run.framework["calibration"]


def measured(runs: list[Run]) -> list[Measured]:
    """Return what a fit needs; sources of one group count by the root of their rows."""
    by_source: dict[str, list[Run]] = collections.defaultdict(list)
    best: dict[tuple[str, ...], float] = {}
    for run in runs:
        by_source[run.source].append(run)
        best[run.source, *run.cell] = min(
            run.seconds or math.inf, best.get((run.source, *run.cell), math.inf)
        )
    found = []
    for rows in by_source.values():
        chosen = random.Random(0).sample(rows, min(len(rows), _SAMPLE))
        slower = [(best[run.source, *run.cell] / (run.seconds or 1.0)) ** _SLOWER for run in chosen]
        weight = math.sqrt(min(len(rows), _SAMPLE)) / sum(slower)
        for run, share in zip(chosen, slower, strict=True):
            found.append(
                Measured(
                    pricer=pricer(run),
                    candidate=candidate(run, traced(run.architecture)[0]),
                    seconds=run.seconds or 1.0,
                    weight=weight * share,
                )
            )
    return found


def with_memory(rows: list[Run], fitted: Framework) -> Framework:
    """Return `fitted` with memory that is not counted, where five rows or more state theirs."""
    stated = [run for run in rows if run.peak_bytes]
    if len(stated) < 5:
        return fitted
    counted = dataclasses.replace(fitted, memory_overhead=0.0, reserved_bytes=0.0)
    found = []
    for run in random.Random(0).sample(stated, min(len(stated), 3 * _SAMPLE)):
        items = estimate(run, counted).memory
        passing = sum(items[name] for name in ("saved_activations", "temporaries", "communication"))
        found.append((sum(items.values()) - passing, passing, run.peak_bytes or 0.0))
    return calibrate_memory(found, fitted)


def with_limit(rows: list[Run], fitted: Framework) -> Framework:
    """Return `fitted` with the share of memory that can be used, if fifty rows or more did not complete."""
    failed = [run for run in rows if run.seconds is None]
    if len(failed) < 50:
        return fitted
    found = []
    for run in random.Random(0).sample(rows, min(len(rows), 6 * _SAMPLE)):
        guess = estimate(run, fitted)
        well = run.seconds is not None and run.seconds < _SLOW * guess.step_seconds
        found.append((guess.peak_bytes / (run.topology.chip.hbm_bytes or math.inf), well))
    return dataclasses.replace(fitted, usable_memory=usable_memory(found))


def _is_like(group: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two groups are one framework on one chip, whatever its variant: they hold memory alike."""
    longer, shorter = sorted((group[1], other[1]), key=len, reverse=True)
    return group[0] == other[0] and (longer == shorter or longer.startswith(f"{shorter}-"))


def _start(tables: Tables, chip: str, framework: str) -> Framework:
    """Return where a fit starts: the record itself; a variant's (``-fp8``) where its framework's came to."""
    rows = tables.get(chip, {})
    parent = framework
    while parent not in rows or parent == framework:
        parent = parent.rpartition("-")[0]
        if not parent:
            return rows.get(framework, plain(chip))
    efficiencies = {name: getattr(rows[parent], name) for name in RANGES}
    return dataclasses.replace(rows.get(framework, rows[parent]), **efficiencies)


def main(arguments: list[str]) -> int:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=csv_file, required=True, help="training runs, one a row")
    parser.add_argument("--sweeps", type=csv_file, required=True, help="many layouts of a model and cluster")
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args(arguments)
    runs = [run for path in (given.runs, given.sweeps) for run in load(path)[0]]
    base, tables = read(SHIPPED)
    for (chip, framework), rows in sorted(groups(runs).items()):
        if given.only not in f"{chip}.{framework}":
            continue
        samples = measured(rows)
        start = _start(tables, chip, framework)
        names = [name for name in RANGES if start.fused_attention or name != "attention_efficiency"]
        before = error(samples, start)
        fitted = calibrate(samples, start, names, given.rounds)
        after = error(samples, fitted)
        fitted = with_memory([run for run in runs if _is_like(group(run), (chip, framework))], fitted)
        print(f"{chip}.{framework}: {len(samples)} rows, error {before:.3f} -> {after:.3f}", flush=True)
        fitted = with_limit([run for run in runs if group(run) == (chip, framework)], fitted)
        tables.setdefault(chip, {})[framework] = fitted
        write(SHIPPED, base, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
