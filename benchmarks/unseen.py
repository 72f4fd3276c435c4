"""Rows of frameworks as if no run of them had been seen: by a plan's record of the chip, and relatives' ways.

`python benchmarks/unseen.py [--runs CSV] [--sweeps CSV] [--json]`

The rows are other people's and not in this repository. Each is priced by the shipped efficiencies of its chip
with the chip's kernel of attention, as `plan()` prices; where they are another chip's (``transferred``), the
table says so. XLA's frameworks run as the product does. Of others a plan knows nothing: how long their hosts
take and what they overlap is what other families of frameworks do (frameworks/record.py, `unseen`); with
--plain not even that. Beside it stands what a constant would say: the median
share of the peak that all other frameworks' rows on that chip reach. Printed are the median absolute errors
of the step time by chip and framework, their ratio over all, and the rank correlation within each cell of
five or more layouts of a sweep.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import statistics
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import accuracy
from frameworks.record import Framework, plain, unseen
from measured.rows import csv_file, load
from measured.run import Run
from meshwright.sharding.cost.calibration import transferred_from
from meshwright.sharding.cost.compute import peak_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """A row that ran: measured, estimated, and the share of the peak that it reached."""

    chip: str
    framework: str
    measured: float
    estimated: float
    at_peak: float

    @property
    def reached(self) -> float:
        """The share of the peak that the run reached."""
        return self.at_peak / self.measured


def record_of(run: Run, bare: bool = False) -> Framework:
    """Return the record of a run's chip, with the ways of its framework's relatives unless `bare`."""
    chip = run.topology.chip.name
    return plain(chip) if bare else unseen(chip, run.framework["calibration"])


def scored(run: Run, bare: bool = False) -> Scored | None:
    """Return a row as a plan would price it; None where it did not complete."""
    if run.seconds is None:
        return None
    chip, record = run.topology.chip, record_of(run, bare)
    pricer = accuracy.pricer(run, record)
    found = accuracy.estimate(run, record)
    peak = peak_flops(chip, run.dtype) * run.topology.num_devices
    return Scored(
        chip=chip.name,
        framework=run.framework["calibration"].split("-fp8")[0],
        measured=run.seconds,
        estimated=found.step_seconds,
        at_peak=pricer.flops / peak,
    )


def constant(row: Scored, rows: list[Scored]) -> float | None:
    """Return the seconds by the median share that other frameworks reach on the row's chip, None without."""
    others = [one.reached for one in rows if one.chip == row.chip and one.framework != row.framework]
    return row.at_peak / statistics.median(others) if others else None


def table(rows: list[Scored]) -> list[dict[str, object]]:
    """Return a line for each chip and framework, and one for all rows that both can say something of."""
    groups: dict[tuple[str, str], list[tuple[float, float | None]]] = collections.defaultdict(list)
    for row in rows:
        guess = constant(row, rows)
        errors = (
            abs(row.estimated / row.measured - 1.0),
            None if guess is None else abs(guess / row.measured - 1.0),
        )
        groups[row.chip, row.framework].append(errors)
    lines: list[dict[str, object]] = []
    for (chip, framework), found in sorted(groups.items()):
        known = [other for _, other in found if other is not None]
        lines.append(
            {
                "chip": chip,
                "framework": framework,
                "rows": len(found),
                "error": statistics.median(own for own, _ in found),
                "constant": statistics.median(known) if known else None,
                "transferred": transferred_from(chip),
            }
        )
    both = [line for line in lines if line["constant"] is not None]
    if both:
        own = statistics.median(float(str(line["error"])) for line in both)
        other = statistics.median(float(str(line["constant"])) for line in both)
        lines.append(
            {
                "chip": "all",
                "framework": "median of these",
                "rows": sum(int(str(line["rows"])) for line in both),
                "error": own,
                "constant": other,
                "transferred": None,
            }
        )
    return lines


def ranks(runs: list[Run], bare: bool = False) -> dict[str, list[float]]:
    """Return source → the rank correlation within each of its cells of five or more completed layouts."""
    cells: dict[tuple[str, ...], list] = collections.defaultdict(list)
    for run in runs:
        found = accuracy.estimate(run, record_of(run, bare))
        cells[(run.source, *run.cell)].append((run, found))
    found: dict[str, list[float]] = {}
    for (source, *_), pairs in cells.items():
        if (score := accuracy.choice(pairs)) is not None:
            found.setdefault(source, []).append(score["spearman"])
    return found


def rank_words(found: list[float]) -> str:
    """Say how well layouts are ranked within cells."""
    return f"rank within {len(found)} cells: median {statistics.median(found):.2f}, least {min(found):.2f}"


def main(arguments: list[str]) -> int:
    """Score the files that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=csv_file, help="training runs, one a row")
    parser.add_argument("--sweeps", type=csv_file, help="many layouts of the same model and cluster")
    parser.add_argument("--plain", action="store_true", help="by XLA's ways, whatever the framework")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if given.runs is None and given.sweeps is None:
        parser.error("nothing to score: the rows are not in this repository; give --runs or --sweeps")
    report: dict[str, object] = {}
    swept: dict[str, list[float]] = {}
    if given.runs is not None:
        rows = [one for run in load(given.runs)[0] if (one := scored(run, given.plain)) is not None]
        report["runs"] = table(rows)
    if given.sweeps is not None:
        report["ranks"] = swept = ranks(load(given.sweeps)[0], given.plain)
    if given.json:
        print(json.dumps(report))
        return 0
    for line in table(rows) if given.runs is not None else ():
        other = "     -" if line["constant"] is None else f"{line['constant']:6.1%}"
        kin = f"  transferred from {line['transferred']}" if line["transferred"] else ""
        print(f"{line['chip']:10} {line['framework']:28} {line['rows']:4} {line['error']:6.1%} {other}{kin}")
    if given.sweeps is not None:
        for source, found in swept.items():
            print(f"{source[:60]}: {rank_words(found)}")
        print(rank_words([one for found in swept.values() for one in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
