"""How the terminal and the page write two plans' figures: the same rows in the same words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .compare import Both, Comparison, Costs

# Differences below this part of a figure are none.
_ALIKE = 5e-4
# Items below this part of the whole of both plans are left out.
_WORTH_A_LINE = 0.004


def choices(shown: Comparison) -> Iterator[tuple[str, str, str, str]]:
    """Yield (table, what is chosen, the first plan's choice, the second's), in words."""
    for table, rows in shown.differs.items():
        for name, (one, other) in rows.items():
            # An axis that a mesh lacks has size 1, a dimension that no axis shards is whole.
            absent = {"mesh": "1", "dims": "whole"}.get(table, "-")
            label = name if table == "values" else f"{table.replace('_', ' ')} {name}"
            yield table, label, in_words(one, absent), in_words(other, absent)


def in_words(value: Any, absent: str = "-") -> str:
    """Write a choice: a spec as ``[fsdp, -]``, a table as ``name=value``, nothing as `absent`."""
    if value is None:
        return absent
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={one}" for name, one in value.items()) or absent
    if isinstance(value, list):
        return "[" + ", ".join(_entry(entry) for entry in value) + "]"
    return str(value)


def _entry(entry: Any) -> str:
    return "x".join(entry) if isinstance(entry, tuple | list) else str(entry or "-")


def items(costs: Costs, name: str, whole: Both) -> list[tuple[str, Both]]:
    """Return the items ``time`` or ``memory`` of `costs` that are worth a line, the largest first."""
    most = max(size or 0.0 for size in whole)
    rows = sorted(getattr(costs, name).items(), key=lambda row: -max(size or 0.0 for size in row[1]))
    return [(key, pair) for key, pair in rows if max(size or 0.0 for size in pair) >= _WORTH_A_LINE * most]


def texts(pair: Both, write: Callable[[float], str]) -> tuple[str, str, str, str]:
    """Return both figures, their difference and their ratio in words; ``-`` and nothing where one is missing.

    >>> texts((2.0, 3.0), "{:g} s".format)
    ('2 s', '3 s', '+1 s', '1.50')
    """
    one, other = pair
    figures = tuple("-" if size is None else write(size) for size in pair)
    if one is None or other is None:
        return figures[0], figures[1], "", ""
    # Figures as alike as this are written alike, and differ by rounding.
    if abs(other - one) <= _ALIKE * max(one, other):
        return figures[0], figures[1], "same", "1.00" if one else ""
    more = ("+" if other > one else "-") + write(abs(other - one))
    ratio = other / one if one else 0.0
    # Two digits that say something, whatever the ratio.
    written = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"
    return figures[0], figures[1], more, written if one else ""
