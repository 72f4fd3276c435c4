"""A report as typed blocks: what a terminal and a page print, each in its own way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from ..words import gib, seconds

# Items below this part of their whole share one line.
WORTH_A_LINE = 0.004

Tone = Literal["", "strong", "soft", "code", "good", "bad"]
# A figure as often as it is known: estimated and compiled, of one plan and of another. None is not known.
Sizes = tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phrase:
    """Words in one tone."""

    text: str
    tone: Tone = ""


Words = str | tuple[Phrase, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A number that a report opens with, and what it is to be read against."""

    name: str
    value: str
    detail: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A paragraph; with `page_only` it speaks of what a terminal does not draw."""

    words: Words
    page_only: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """Sentences, one below the other; a terminal prints `most` of them."""

    items: tuple[Words, ...]
    most: int = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a bar: the part of the full width that it takes, and its colour."""

    part: float
    kind: str


# The pieces of one bar, from the left.
Track = tuple[Segment, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A name, its figures, and one or two bars of the same scale.

    `depth` is how far in the name stands, below what it is a part of; `notes` are further lines on it.
    """

    name: str
    figures: tuple[str, ...]
    tracks: tuple[Track, ...] = ()
    depth: int = 0
    tone: Tone = ""
    notes: tuple[Words, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars below one another, of which a terminal prints `most` and then `rest`.

    `head` names the columns of figures, `legend` maps kinds of segments to what they mean.
    """

    bars: tuple[Bar, ...]
    head: tuple[str, ...] = ()
    legend: Mapping[str, str] = dataclasses.field(default_factory=dict)
    most: int = 100
    rest: Bar | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The dimensions of an array, with the mesh axes that cut each of them."""

    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table: figures stand on the right and are never folded."""

    name: str = ""
    figures: bool = False
    page_only: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of a table: `key` is its colour in a drawing, `group` what it is counted with."""

    cells: tuple[Words | Cut, ...]
    key: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells, of which a terminal prints `most` of each group."""

    columns: tuple[Column, ...]
    entries: tuple[Entry, ...]
    most: int = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture: `svg` on a page, lines of `art` in a terminal, `caption` below it on both.

    `note` says on a page what is left out of the picture, `legend` what its kinds mean.
    """

    svg: str
    art: tuple[str, ...] = ()
    caption: str = ""
    note: str = ""
    legend: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chapter:
    """Blocks below a title."""

    title: str
    blocks: tuple[Text | List | Bars | Table | Drawing, ...]
    page_only: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A report. `name` is what a browser's tab shows, `title` the first line.

    `warnings` are what a reader has to know before the figures mean anything.
    """

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    warnings: tuple[str, ...] = ()
    chapters: tuple[Chapter, ...] = ()


def worth_a_line(items: Mapping[str, Sizes], whole: float) -> list[tuple[str, Sizes]]:
    """Return the items by their largest size, those below `WORTH_A_LINE` of `whole` as one, ``the rest``.

    >>> worth_a_line({"a": (1.0, 2.0), "b": (0.001, None), "c": (600.0, 0.0), "d": (0.0, 1.0)}, 600.0)
    [('c', (600.0, 0.0)), ('the rest', (1.001, 3.0))]
    """
    sizes = {name: max((size or 0.0 for size in row), default=0.0) for name, row in items.items()}
    ordered = sorted((name for name in items if sizes[name] > 0.0), key=lambda name: -sizes[name])
    small = [name for name in ordered if sizes[name] < WORTH_A_LINE * whole]
    if len(small) < 2:
        return [(name, items[name]) for name in ordered]
    rest = tuple(map(total, zip(*(items[name] for name in small), strict=True)))
    return [*((name, items[name]) for name in ordered[: -len(small)]), ("the rest", rest)]


def total(sizes: Iterable[float | None]) -> float | None:
    """Return the sum of what is known, None where nothing is."""
    known = [size for size in sizes if size is not None]
    return sum(known) if known else None


def time_text(time: float) -> str:
    """Write a time as `seconds` does, and none at all as ``0``."""
    return seconds(time) if time else "0"


def size_text(size: float) -> str:
    """Write bytes as `gib` does, and none at all as ``0``."""
    return gib(size) if size else "0"


def change(before: float | None, after: float | None) -> str:
    """Write the difference of two figures as ``+6.2%``, or ``x 3.1`` where it is more than twofold."""
    if not before or after is None:
        return ""
    ratio = after / before
    return f"x {ratio:.3g}" if ratio >= 2 else f"{ratio - 1:+.1%}"


def spec_in_words(entries: Iterable[str | Sequence[str] | None]) -> str:
    """Write the mesh axes that cut each dimension of an array.

    >>> spec_in_words([None, "tensor", ("data", "fsdp"), ()])
    '[-, tensor, dataxfsdp, -]'
    """
    axes = (entry if isinstance(entry, str) else "x".join(entry or ()) for entry in entries)
    return f"[{', '.join(one or '-' for one in axes)}]"


def plain(words: Words) -> str:
    """Return words without their tones."""
    return words if isinstance(words, str) else "".join(phrase.text for phrase in words)
