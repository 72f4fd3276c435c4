"""Lines of the user's code that equations come from."""

from __future__ import annotations

import pathlib
from typing import Any

from jax.extend import source_info_util

from ..words import file_or_cell

_OURS = str(pathlib.Path(__file__).parents[1])
# Where packages are installed: a layer of a library stands for the line that calls it.
_INSTALLED = ("site-packages", "dist-packages")


def line_of(equation: Any) -> str:
    """Return file, line and function of `equation`, ``model.py:12 (forward)``; ``In[2]:12`` in a notebook.

    The innermost frame that is neither of an installed package nor of this one; where there is none, what JAX
    takes for the user's.
    """
    traceback = equation.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        name = file_or_cell(frame.file_name)
        if not name.startswith((_OURS, "<")) and not any(part in name for part in _INSTALLED):
            function = frame.function_name.rpartition("<locals>.")[2]
            return f"{name}:{frame.line_num} ({function})"
    return source_info_util.summarize(equation.source_info)


def is_ours(line: str) -> bool:
    """Whether a line is of this package, which tells a user nothing.

    >>> is_ours("model.py:12 (forward)")
    False
    """
    return line.startswith(_OURS)
