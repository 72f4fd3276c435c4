"""Figures of runs that `gpu.sh` has made: whether a profile changes losses, what the loop costs.

`python benchmarks/gpu/summary.py losses RUN OTHER`, and `... loop RUN ROWS.csv NAME`.
"""

from __future__ import annotations

import csv
import json
import pathlib
import statistics
import sys

# Steps of a run in which caches fill and the first save is prepared.
_FIRST = 5


def main() -> None:
    """Print one line."""
    what, run, *more = sys.argv[1:]
    records = _records(pathlib.Path(run))
    if what == "losses":
        other = _records(pathlib.Path(more[0]))
        if [r["step"] for r in records] != [r["step"] for r in other]:
            sys.exit(f"{run} has steps to {len(records)}, {more[0]} to {len(other)}")
        pairs = [(a["loss"], b["loss"]) for a, b in zip(records, other, strict=True)]
        apart = max(abs(a - b) / abs(b) for a, b in pairs)
        print(f"losses of {len(pairs)} steps, with profiles and saves and without: at most {apart:.2e} apart")
    elif what == "loop":
        with pathlib.Path(more[0]).open() as file:
            step = next(
                float(r["measured_step_seconds"]) for r in csv.DictReader(file) if r["name"] == more[1]
            )
        loop = statistics.median(r["step_seconds"] for r in records[_FIRST:])
        print(f"loop {loop:.6f} s a step, the compiled step alone {step:.6f} s: {loop / step - 1:+.2%}")
    else:
        sys.exit(f"{what} is neither losses nor loop")


def _records(run: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
