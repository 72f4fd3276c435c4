"""Fit the calibration file: `python benchmarks/calibrate.py [--only CHIP.FRAMEWORK] [--rounds N]`.

Starts from the shipped file, fits one record for each (chip, framework) to measured runs and writes the file
again. Of a large source a fixed sample of rows is used.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import random
import sys
from pathlib import Path

from accuracy import _DATA, csv_file, pricer
from measured.layouts import candidate
from measured.programs import traced
from measured.rows import Run, load
from meshwright.sharding.cost.calibration import Calibration, calibration_for, read, write
from meshwright.sharding.cost.fit import (
    RANGES,
    Measured,
    calibrate,
    calibrate_memory,
    error,
    usable_memory,
)

_FILE = Path(__file__).resolve().parents[1] / "sharding" / "cost" / "calibration.toml"
_SAMPLE = 200
# A run so many times slower than predicted went wrong: near its limit an allocator thrashes.
_SLOW = 2.0
_NOTE = """Efficiencies that datasheets do not give, for each chip under each framework; see calibration.py.
Fitted by benchmarks/calibrate.py to measured_runs.csv and measured_sweeps.csv; which attention kernel a
framework runs and what it saves are facts of the framework, set by hand. What hides sending values to the
host, what is left free of a device's memory, and what GPUs' own records hide of FSDP's gathers and
reductions are as compiled programs show (benchmarks/compiled.py). By product_cycles, steps read without
schedules come out as with them (benchmarks/compiled_runs.py, with --schedules and without); tpu7x has the
others' by assumption. fusion_efficiency is what libtpu's cycles come to (tests/sharding/compiled).
a100.deepspeed-replicated was fitted together with a100.megatron-deepspeed, before they were told apart, and
kept: of five fits it chose best on the rows it was fitted to, by ties that other fits break otherwise."""

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


def with_memory(rows: list[Run], fitted: Calibration) -> Calibration:
    """Return `fitted` with memory that is not counted, where five rows or more state theirs."""
    stated = [run for run in rows if run.peak_bytes]
    if len(stated) < 5:
        return fitted
    plain = dataclasses.replace(fitted, memory_overhead=0.0, reserved_bytes=0.0)
    found = []
    for run in random.Random(0).sample(stated, min(len(stated), 3 * _SAMPLE)):
        prices = pricer(run)
        prices.calibration = plain
        items = prices.price(candidate(run, traced(run.architecture)[0])).memory
        passing = sum(items[name] for name in ("saved_activations", "temporaries", "communication"))
        found.append((sum(items.values()) - passing, passing, run.peak_bytes or 0.0))
    return calibrate_memory(found, fitted)


def with_limit(rows: list[Run], fitted: Calibration) -> Calibration:
    """Return `fitted` with the share of memory that can be used, if fifty rows or more did not complete."""
    failed = [run for run in rows if run.seconds is None]
    if len(failed) < 50:
        return fitted
    found = []
    for run in random.Random(0).sample(rows, min(len(rows), 6 * _SAMPLE)):
        prices = pricer(run)
        prices.calibration = fitted
        guess = prices.price(candidate(run, traced(run.architecture)[0]))
        well = run.seconds is not None and run.seconds < _SLOW * guess.step_seconds
        found.append((guess.peak_bytes / (run.topology.chip.hbm_bytes or math.inf), well))
    return dataclasses.replace(fitted, usable_memory=usable_memory(found))


def _is_like(group: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two groups are one framework on one chip, whatever its variant: they hold memory alike."""
    longer, shorter = sorted((group[1], other[1]), key=len, reverse=True)
    return group[0] == other[0] and (longer == shorter or longer.startswith(f"{shorter}-"))


def _start(tables: dict[str, dict[str, Calibration]], chip: str, framework: str) -> Calibration:
    """Return where a fit starts: the record itself; a variant's (``-fp8``) where its framework's came to."""
    rows = tables.get(chip, {"default": calibration_for(chip)})
    parent = framework
    while parent not in rows or parent == framework:
        parent = parent.rpartition("-")[0]
        if not parent:
            return rows.get(framework, rows["default"])
    efficiencies = {name: getattr(rows[parent], name) for name in RANGES}
    return dataclasses.replace(rows.get(framework, rows[parent]), **efficiencies)


def main(arguments: list[str]) -> int:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=csv_file, default=str(_DATA / "measured_runs.csv"))
    parser.add_argument("--sweeps", type=csv_file, default=str(_DATA / "measured_sweeps.csv"))
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args(arguments)
    runs = [run for path in (given.runs, given.sweeps) for run in load(path)[0]]
    tables: dict[str, dict[str, Calibration]] = read(_FILE)
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
        tables.setdefault(chip, {"default": calibration_for(chip)})[framework] = fitted
        write(_FILE, tables, _NOTE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
