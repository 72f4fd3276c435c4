"""Readings of a folder of traces beside what its README says they should be.

`python benchmarks/traces.py FOLDER` reads each `*.xplane.pb` and `*.xplane.pb.gz` of a folder. Beside the row
of the README's table that begins with the trace's name it prints what the reader makes of it: steps and their
seconds, the longest operations, collectives, and its notes. A refused trace is printed with the reason.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import time
from collections.abc import Iterable

from meshwright.runtime.profiling import Profile, profile_run
from meshwright.sharding.errors import UserError

_ROW = re.compile(r"^\| `([\w.]+)` \| (.*) \|$", re.MULTILINE)
# Columns of the README's table after the name, before what a reader made of it when the table was written.
_COLUMNS = ("steps", "seconds", "operations", "collectives")


def main() -> None:
    """Print the readings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    said = _table(folder / "README.md")
    for trace in sorted({*folder.glob("*.xplane.pb"), *folder.glob("*.xplane.pb.gz")}):
        name = trace.name.partition(".")[0]
        start = time.perf_counter()
        try:
            read = _reading(profile_run(trace))
        except UserError as error:
            read = {"refused": str(error)}
        print(f"== {name} ({time.perf_counter() - start:.1f} s)")
        for column in dict.fromkeys((*_COLUMNS, *read)):
            if column in said.get(name, {}):
                print(f"  {column:12} wanted: {said[name][column]}")
            if column in read:
                print(f"  {column:12}   read: {read[column]}")


def _table(readme: pathlib.Path) -> dict[str, dict[str, str]]:
    """Return what the last table of a README says of each trace, by its columns."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    return {name: dict(zip(_COLUMNS, cells.split(" | "), strict=False)) for name, cells in _ROW.findall(text)}


def _reading(profile: Profile) -> dict[str, str]:
    of = "step" if profile.steps else "trace"
    steps = {device: sum(s.device == device for s in profile.steps) for device in profile.devices}
    counts = ", ".join(f"{device} {count}" for device, count in steps.items())
    programs = ", ".join(f"{p.module or 'unnamed'} {p.executions}" for p in profile.programs)
    placed, total = profile.placed
    mean = profile.mean()
    words = [
        f"{mean.wall_seconds:.5f} a {of}, compute {mean.compute_seconds:.5f}",
        f"copies {mean.copy_seconds:.5f}, idle {mean.idle_seconds:.5f}",
    ]
    if profile.steps:
        walls = [step.wall_seconds for step in profile.steps]
        first = profile.by_step()[:5]
        words += [
            f"from {min(walls):.5f} to {max(walls):.5f}",
            f"first steps {_seconds(s.wall_seconds for s in first)}",
            f"end to end {_seconds(s.wall_seconds + s.gap_seconds for s in first[1:])}",
            f"busy {_seconds(s.compute_seconds for s in first)}",
        ]
    top = (f"{o.name[:72]} {o.count:g} x, {o.seconds * 1e3:.3f} ms" for o in profile.operations[:4])
    return {
        "steps": f"{counts}; executions: {programs}; placed {placed} of {total}",
        "seconds": "; ".join(words),
        "operations": f"a {of}: {'; '.join(top)}",
        "collectives": ", ".join(f"{c.label} {c.count:g}" for c in mean.collectives) or "none",
        "notes": "; ".join(profile.notes),
    }


def _seconds(values: Iterable[float]) -> str:
    return " ".join(f"{value:.5f}" for value in values)


if __name__ == "__main__":
    main()
