"""How sizes, times, lines and layouts are written in sentences."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

_GIB = 2**30
_NAMES_SHOWN = 3


def gib(size: float) -> str:
    """Write bytes in GiB, in MiB below a tenth of one, in KiB below a tenth of that, else as they are."""
    for unit, one in (("GiB", _GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= one / 10:
            return f"{size / one:.1f} {unit}"
    return f"{size:.0f} B"


def seconds(time: float) -> str:
    """Write a time in seconds, milliseconds or microseconds."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if time >= size:
            return f"{time / size:.3g} {unit}"
    return f"{time / 1e-6:.3g} µs"


def file_or_cell(file: str) -> str:
    """Return what a notebook calls the cell that a file stands for, ``In[2]``; other files as they are."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    named = getattr(getattr(shell, "compile", None), "format_code_name", lambda file: None)(file)
    return named[1] if named else file


def first_of(names: Iterable[object], most: int = 3, between: str = ", ") -> str:
    """Write the first of many names and how many there are besides.

    >>> first_of("abcde")
    'a, b, c and 2 more'
    """
    told = [str(name) for name in names]
    return between.join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")


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
    return first_of(short, _NAMES_SHOWN - (len(short) > _NAMES_SHOWN), " ")


def layout_in_words(mesh: Mapping[str, int], remat: str, microbatches: int, saved: Mapping[str, str]) -> str:
    """Write the choices of a layout: mesh, what layers keep, microbatches."""
    sizes = [f"{axis}={size}" for axis, size in mesh.items() if size > 1] or ["one device"]
    return f"{' x '.join(sizes)}, {remat_in_words(remat, saved)}, microbatches={microbatches}"
