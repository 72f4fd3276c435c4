"""Cycles of products by libtpu's schedule, which are nearer to measurements than the program's estimates.

``estimated_cycles`` come from the cost model by which libtpu chooses windows, before it schedules anything.
The model adds the cycles of a window's vector operations (the partial sum, a gradient's elementwise prologue)
to those of the matrix units, although both run in the same bundles. The length of the final schedule of each
fusion, in bundles of one cycle for one window, can be dumped. As a share of the chip's peak: a product of
8192 x 8192 x 8192 on v6e, for which tpu-recipes measured 0.82 to 0.90, has 0.70 by the model and 0.79 by the
schedule; a product with the gradient of silu before it on v5e has 0.61 and 0.82.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping

from ..hardware.chip import Chip
from ..hlo.text import HloModule, Instruction

_NAME = re.compile(r"%([\w.\-]+) = ")
_TOTAL = re.compile(r"total scheduled bundles:\s*(\d+)")
_BOUNDS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')
_WINDOWS = re.compile(r'"window_config":\{[^}]*"estimated_cycles":[^}]*\}')
_FILES = "*schedule-analysis_final_bundles.txt"


def dump_arguments(folder: pathlib.Path) -> str:
    """Return the value of ``LIBTPU_INIT_ARGS`` with which libtpu writes its schedules to `folder`.

    libtpu 0.0.42 and 0.0.50 know these arguments. One that a version does not know ends its process.
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
    """Return instruction → bundles of its schedule, for the schedules that libtpu wrote to `folder`."""
    found: dict[str, int] = {}
    for path in folder.glob(_FILES):
        text = path.read_text(encoding="utf-8", errors="replace")
        name, total = _NAME.search(text), _TOTAL.search(text)
        if name and total:
            found[name[1]] = int(total[1])
    return found


def for_all_alike(module: HloModule, bundles: Mapping[str, int]) -> dict[str, int]:
    """Return `bundles` with the instructions added that share a known instruction's schedule.

    libtpu schedules fusions that are alike once, under the name of one of them.
    """
    known = {
        alike: bundles[instruction.name]
        for instruction in module.instructions.values()
        if instruction.name in bundles and (alike := _windows(instruction)) is not None
    }
    more = {
        instruction.name: known[alike]
        for instruction in module.instructions.values()
        if (alike := _windows(instruction)) in known
    }
    return {**more, **bundles}


def _windows(instruction: Instruction) -> tuple[str, str] | None:
    """Return what fusions that are alike have in common: the result's shape, the windows and their cycles."""
    found = _WINDOWS.search(instruction.attributes)
    return None if found is None else (instruction.shape, found[0])


def scheduled_cycles(instruction: Instruction, bundles: Mapping[str, int], chip: Chip) -> float | None:
    """Return the cycles of a fusion by its schedule, None where that is not known.

    The whole schedule counts for every window, so that instructions for only the first or last window of a
    sum are counted too often. The two cores of a megacore share the windows.
    """
    bounds = _BOUNDS.search(instruction.attributes)
    if bounds is None or instruction.name not in bundles:
        return None
    windows = math.prod(int(bound.strip('" ')) for bound in bounds[1].split(",") if bound.strip('" '))
    cores = 2 if chip.compiler_chip_config == "megacore" else 1
    return windows * bundles[instruction.name] / cores
