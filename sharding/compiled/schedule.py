"""What libtpu's own schedule says of its products, of which the cycles in the program say too much.

``estimated_cycles`` come from a cost model that libtpu chooses windows by, before it has scheduled anything:
it adds what a window's vectors cost (its sum so far, a gradient's elementwise prologue) to what the matrix
units take. They run in the same bundles. The schedule comes later, and its length for each fusion can be had
as a dump: so many bundles, a cycle each, once for every window. For 8192 x 8192 x 8192 on v6e, of which
tpu-recipes measured 0.82 to 0.90 of the peak, the model says 0.70 and the schedule 0.79; for a product with
silu's gradient before it on v5e the model says 0.61 and the schedule 0.82.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping

from ..hardware.chip import Chip
from ..hlo.text import Instruction, Program

_NAME = re.compile(r"%([\w.\-]+) = ")
_TOTAL = re.compile(r"total scheduled bundles:\s*(\d+)")
_BOUNDS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')
_WINDOWS = re.compile(r'"window_config":\{[^}]*"estimated_cycles":[^}]*\}')
_FILES = "*schedule-analysis_final_bundles.txt"


def dump_arguments(folder: pathlib.Path) -> str:
    """Return what libtpu must be started with to leave its schedules in `folder`.

    Libtpu 0.0.42 and 0.0.50 know these arguments; one that it does not know ends its process.
    """
    return " ".join(
        (
            f"--xla_jf_dump_to={folder}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_hlo_text=false",
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*",
        )
    )


def read_bundles(folder: pathlib.Path) -> dict[str, int]:
    """Return instruction → bundles of its schedule, of those that libtpu left a schedule of in `folder`."""
    found: dict[str, int] = {}
    for path in folder.glob(_FILES):
        text = path.read_text(encoding="utf-8", errors="replace")
        name, total = _NAME.search(text), _TOTAL.search(text)
        if name and total:
            found[name[1]] = int(total[1])
    return found


def for_all_alike(program: Program, bundles: Mapping[str, int]) -> dict[str, int]:
    """Return `bundles` with those instructions that the compiler made from the same code as a known one.

    It schedules fusions that are alike once, under the name of one of them.
    """
    known = {
        alike: bundles[instruction.name]
        for instruction in program.instructions.values()
        if instruction.name in bundles and (alike := _windows(instruction)) is not None
    }
    more = {
        instruction.name: known[alike]
        for instruction in program.instructions.values()
        if (alike := _windows(instruction)) in known
    }
    return {**more, **bundles}


def _windows(instruction: Instruction) -> tuple[str, str] | None:
    """Return the result and the windows of a fusion, with the cycles estimated for it."""
    found = _WINDOWS.search(instruction.attributes)
    return None if found is None else (instruction.shape, found[0])


def scheduled_cycles(instruction: Instruction, bundles: Mapping[str, int], chip: Chip) -> float | None:
    """Return the cycles of a fusion by its schedule: all of it for every window. None where it is not known.

    What is done for the first and the last window of a sum only is counted for each, so that it is rather
    too much. Both cores of a megacore share the windows.
    """
    bounds = _BOUNDS.search(instruction.attributes)
    if bounds is None or instruction.name not in bundles:
        return None
    windows = math.prod(int(bound.strip('" ')) for bound in bounds[1].split(",") if bound.strip('" '))
    cores = 2 if chip.compiler_chip_config == "megacore" else 1
    return windows * bundles[instruction.name] / cores
