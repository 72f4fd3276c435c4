"""Sentences with numbers: what a layout is, what it costs, and why another one lost to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .cost.candidate import Candidate
from .planner.choices.storage import computed
from .planner.search import Priced
from .program.program import Program

_GIB = 2**30
_NAMES_SHOWN = 3


def gib(size: float) -> str:
    """Write bytes in GiB, in MiB below a tenth of one, in KiB below a tenth of that."""
    for unit, one in (("GiB", _GIB), ("MiB", 2**20)):
        if size >= one / 10:
            return f"{size / one:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def seconds(time: float) -> str:
    """Write a time in seconds, milliseconds or microseconds."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if time >= size:
            return f"{time / size:.3g} {unit}"
    return f"{time / 1e-6:.3g} µs"


def storage_of(program: Program, layout: Candidate) -> str:
    """Say how parameters and moments are stored: replicated, fsdp, zero-1 or fsdp + zero-1."""
    gathered = any(
        tuple(computed(argument, layout.dims, layout.mesh)) != layout.stored[argument.index]
        for argument in program.parameters
    )
    further = any(layout.optimizer[index] != stored for index, stored in layout.stored.items())
    kinds = [kind for kind, found in (("fsdp", gathered), ("zero-1", further)) if found]
    return " + ".join(kinds) or "replicated"


def why_lost(best: Priced, other: Priced, capacity_bytes: float, stored: tuple[float, float] | None) -> str:
    """Say in one sentence why `other` lost to `best`.

    `stored` are the bytes that each stores on a device, given where those decide before time does.
    """
    if not other.fits and not other.bound:
        return misfit(other, capacity_bytes)
    if stored is not None and stored[1] > 1.1 * stored[0]:
        return f"stores {gib(stored[1])} of parameters and moments on a device instead of {gib(stored[0])}"
    ours, theirs = best.estimate, other.estimate
    slower = theirs.step_seconds / ours.step_seconds - 1
    if slower < 1e-4:
        return f"takes as long, and {gib(theirs.peak_bytes)} instead of {gib(ours.peak_bytes)}"
    item, more = _largest_gain(ours.time, theirs.time)
    share = f"{slower:.1%}" if slower < 0.1 else f"{slower:.0%}" if slower < 2 else f"{1 + slower:.1f} times"
    least = "at least " if other.bound else ""
    return f"{least}{share} {'as long' if slower >= 2 else 'slower'}: {item} takes {seconds(more)} more"


def misfit(one: Priced, capacity_bytes: float) -> str:
    """Say by how much a layout at its smallest does not fit, and what takes most."""
    item, size = max(one.estimate.memory.items(), key=lambda row: row[1])
    return (
        f"does not fit: {gib(one.estimate.needed_bytes)} of {gib(capacity_bytes)} a device even with "
        f"{remat_in_words(one.candidate.remat, one.candidate.saved)} and "
        f"microbatches={one.candidate.microbatches}; {item} takes {gib(size)}"
    )


def remat_in_words(remat: str, saved: Mapping[str, str]) -> str:
    """Write what layers keep: a policy, or the values."""
    if not saved:
        return f"remat={remat}"
    kept = [name for name, place in saved.items() if place == "device"]
    away = [name for name, place in saved.items() if place == "host"]
    words = [f"keep {_listed(kept)}"] if kept else []
    words += [f"{_listed(away)} on the host"] if away else []
    return ", ".join(words)


def _listed(names: Sequence[str]) -> str:
    """Write the first few of many names, without the folder that all share."""
    folders = {name.partition("/")[0] for name in names}
    prefix = f"{folders.pop()}/" if len(folders) == 1 and len(names) > 1 else ""
    short = [name.removeprefix(prefix) for name in names]
    if len(short) <= _NAMES_SHOWN:
        return " ".join(short)
    return f"{' '.join(short[: _NAMES_SHOWN - 1])} and {len(short) - _NAMES_SHOWN + 1} more"


def layout_in_words(mesh: Mapping[str, int], remat: str, microbatches: int, saved: Mapping[str, str]) -> str:
    """Write the choices of a layout: mesh, what layers keep, microbatches."""
    sizes = [f"{axis}={size}" for axis, size in mesh.items() if size > 1] or ["one device"]
    return f"{' x '.join(sizes)}, {remat_in_words(remat, saved)}, microbatches={microbatches}"


def _largest_gain(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[str, float]:
    gains = {item: size - ours.get(item, 0.0) for item, size in theirs.items()}
    return max(gains.items(), key=lambda row: row[1])
