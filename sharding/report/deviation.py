"""A planned loss beside the plain function: what each gave, and the parameters furthest apart."""

from __future__ import annotations

from collections.abc import Mapping

from ..transform.deviation import Deviation
from .document import Chapter, Column, Document, Entry, Phrase, Table, Text, Words

_WORST = 5


def deviation_document(
    types: Mapping[str, Deviation], *, of: str, tried: str, notes: tuple[str, ...] = ()
) -> Document:
    """Return how far a planned loss was from the plain function, for each type of its products.

    Args:
        types: name of a type → what was found with it.
        of: the layout that was tried, in words.
        tried: what it was tried with, in words.
        notes: sentences that a reader has to know.
    """
    passes = all(one.passes for one in types.values())
    verdict = "the plain function's values" if passes else "NOT the plain function's values"
    return Document(
        name=f"Check of {of}",
        title=f"{'PASS' if passes else 'FAIL'}: {of} gives {verdict}",
        warnings=notes,
        chapters=(
            Chapter(title="tried with", blocks=(Text(words=tried),)),
            *(_chapter(name, one) for name, one in types.items()),
        ),
    )


def _chapter(name: str, found: Deviation) -> Chapter:
    rows = ([None] if None in found.apart else []) + [path for path in found.worst if path is not None]
    left = len(rows) - 1 - _WORST
    entries = [Entry(cells=_cells(path, found)) for path in rows[: 1 + _WORST]]
    columns = (
        Column(name=""),
        Column(name="apart", figures=True),
        Column(name="rounding allows", figures=True),
        Column(name=""),
    )
    own = "" if found.own is None else f"{found.own:.7g} by the plain function in {name}, "
    measure = "by the plain function" if found.own is None else "by it in wider types"
    words = f"loss {found.loss:.7g} as planned, {own}{found.expected:.7g} {measure}"
    if found.routed is not None:
        turned, tokens = found.routed
        words += (
            f"; the plain function in {name} chooses other experts than in wider types for {turned:,} of "
            f"{tokens:,} tokens of a layer, which is part of what rounding does"
        )
    more = (Text(words=f"and {left} gradients nearer than these"),) if left > 0 else ()
    return Chapter(
        title=f"in {name}", blocks=(Text(words=words), Table(columns=columns, entries=tuple(entries)), *more)
    )


def _cells(path: str | None, found: Deviation) -> tuple[Words, ...]:
    fits = found.apart[path] <= found.allowed[path]
    verdict = (Phrase(text="" if fits else "beyond rounding", tone="bad"),)
    name = "loss" if path is None else f"gradient of {path}"
    return name, f"{found.apart[path]:.1e}", f"{found.allowed[path]:.1e}", verdict
