"""Prints a document in a terminal: nothing is cut off, what is too long for its place is folded."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .document import (
    Bar,
    Bars,
    Column,
    Cut,
    Document,
    Drawing,
    List,
    Phrase,
    Table,
    Text,
    Tone,
    Track,
    Words,
    plain,
    spec_in_words,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

# A line is pieces of text, each with a style of rich; a row is cells that are still to be folded.
_Line = list[tuple[str, str]]
_Row = tuple[Words, ...]

_STYLES = {"": "", "strong": "bold", "soft": "dim", "code": "dim", "good": "green", "bad": "yellow"}
# Beyond this many columns the eye loses its line.
_WIDEST = 120
_INDENT, _BETWEEN = 2, 2
# Bars of so many columns; of less than the least they say nothing.
_BAR, _LEAST_BAR = 24, 8


@dataclasses.dataclass(frozen=True)
class Printed:
    """A document that rich prints, in the width of the console."""

    document: Document

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        from rich.text import Text as Line

        for line in _document(self.document, min(options.max_width, _WIDEST)):
            printed = Line.assemble(*line)
            printed.rstrip()
            yield printed


def plain_text(document: Document, width: int = 80) -> str:
    """Return what a terminal of `width` columns shows, without styles."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in _document(document, width))


def _document(document: Document, width: int) -> Iterator[_Line]:
    yield from _folded((Phrase(text=document.title, tone="strong"),), width)
    figures = [(one.name, one.value, (Phrase(text=one.detail, tone="soft"),)) for one in document.figures]
    yield from _laid(figures, (False, False, False), width)
    for warning in document.warnings:
        yield from _folded((Phrase(text=warning, tone="bad"),), width)
    for chapter in document.chapters:
        if not chapter.page_only:
            yield []
            yield from _folded((Phrase(text=chapter.title, tone="strong"),), width)
            for block in chapter.blocks:
                yield from _block(block, width)


def _block(block: Text | List | Bars | Table | Drawing, width: int) -> Iterator[_Line]:
    match block:
        case Text():
            yield from () if block.page_only else _indented(block.words, width)
        case List():
            for item in [*block.items[: block.most], *_more(len(block.items) - block.most)]:
                for number, line in enumerate(_indented(item, width - _INDENT)):
                    yield [(" " * _INDENT * bool(number), ""), *line]
        case Bars():
            yield from _bars(block, width)
        case Table():
            yield from _table(block, width)
        case Drawing():
            lines = [*block.art, *filter(None, [block.caption])]
            yield from ([(" " * _INDENT + line, "")] for line in lines)


def _more(left: int, of: str = "") -> list[str]:
    return [f"and {left} more {of}".strip()] if left > 0 else []


def _indented(words: Words, width: int, by: int = _INDENT) -> Iterator[_Line]:
    for line in _folded(words, width - by):
        yield [(" " * by, ""), *line]


def _bars(block: Bars, width: int) -> Iterator[_Line]:
    shown = list(block.bars[: block.most])
    if left := _more(len(block.bars) - block.most):
        shown.append(block.rest or Bar(name=left[0], figures=()))
    count = max((len(bar.figures) for bar in shown), default=0)
    heads = list(block.head)
    if any(len(bar.tracks) > 1 for bar in shown):
        # Both bars of a row stand in one line, the first in its upper half.
        heads[:2] = [f"▀ {heads[0]}", f"▄ {heads[1]}"]
    names = [" " * _INDENT * bar.depth + bar.name for bar in shown]
    figures = [(*bar.figures, *[""] * count)[:count] for bar in shown]
    columns = [names, *zip(*[heads, *figures] if heads else figures, strict=False)]
    free = width - sum(max(map(len, column)) + _BETWEEN for column in columns) - _INDENT
    rows: list[_Row | _Line] = []
    if heads:
        rows.append(_toned(("", *heads, ""), "soft"))
    for name, row, bar in zip(names, figures, shown, strict=True):
        drawn = _drawn(bar.tracks, min(_BAR, free)) if bar.tracks and free >= _LEAST_BAR else ""
        cells = _toned(row, "soft" if bar.tone == "soft" else "")
        rows.append(((Phrase(text=name, tone=bar.tone),), *cells, drawn))
        for note in bar.notes:
            words = (Phrase(text=note, tone="soft"),) if isinstance(note, str) else note
            rows += _indented(words, width, _INDENT * (bar.depth + 2))
    yield from _laid(rows, (False, *[True] * count, False), width)


def _toned(cells: Iterable[str], tone: Tone) -> _Row:
    return tuple((Phrase(text=cell, tone=tone),) for cell in cells)


def _drawn(tracks: Sequence[Track], width: int) -> str:
    """Draw one bar, hidden parts in another tone; of two the first in the upper half of the line."""

    def cells(track: Track, hidden: bool = True) -> int:
        part = sum(one.part for one in track if hidden or "hidden" not in one.kind)
        return max(round(part * width), 1) if part else 0

    *above, track = tracks
    solid, whole = cells(track, False), cells(track)
    upper = cells(above[0]) if above else solid
    if not above and whole == 1 and sum(one.part for one in track) * width < 0.5:
        return "▏"
    marks = {(True, True): "█", (True, False): "▀", (False, True): "▄"}
    return "".join(marks.get((n < upper, n < solid), "░") for n in range(max(upper, whole)))


def _table(table: Table, width: int) -> Iterator[_Line]:
    counts = Counter(entry.group for entry in table.entries)
    seen: Counter[str] = Counter()
    rows: list[_Row | _Line] = []
    for entry in table.entries:
        seen[entry.group] += 1
        if seen[entry.group] <= table.most:
            rows.append(tuple(_cells(entry.cells, table.columns)))
        elif seen[entry.group] == counts[entry.group]:
            rows += _indented(_more(counts[entry.group] - table.most, entry.group)[0], width)
    columns = [column for column in table.columns if not column.page_only]
    heads, right = [column.name for column in columns], [column.figures for column in columns]
    cut = next((n for n, cell in enumerate(table.entries[0].cells) if isinstance(cell, Cut)), None)
    if cut is not None:
        heads.insert(cut + 1, "cut by")
        right[cut : cut + 1] = [True, False]
    yield from _laid([_toned(heads, "soft"), *rows] if any(heads) else rows, right, width)


def _cells(cells: Iterable[Words | Cut], columns: Iterable[Column]) -> Iterator[Words]:
    """Yield the cells that are shown; of a shape, what cuts it is a cell of its own."""
    for cell, column in zip(cells, columns, strict=True):
        if isinstance(cell, Cut):
            yield from ("x".join(map(str, cell.shape)), spec_in_words(cell.axes))
        elif not column.page_only:
            yield cell


def _laid(rows: Sequence[_Row | _Line], right: Sequence[bool], width: int) -> Iterator[_Line]:
    """Yield rows of cells below one another, and lines between them as they are.

    Columns on the `right` take what they need and are never folded, the others share evenly what is left.
    """
    cells = [row for row in rows if isinstance(row, tuple)]
    sizes = [max(len(plain(cell)) for cell in column) for column in zip(*cells, strict=True)]
    words = sorted((n for n, size in enumerate(sizes) if not right[n]), key=lambda n: sizes[n])
    free = (
        width
        - _INDENT
        - _BETWEEN * (len(sizes) - 1)
        - sum(n for n, r in zip(sizes, right, strict=False) if r)
    )
    for place, n in enumerate(words):
        sizes[n] = max(min(sizes[n], free // (len(words) - place)), 1)
        free -= sizes[n]
    for row in rows:
        if isinstance(row, list):
            yield row
            continue
        folded = [list(_folded(cell, size)) or [[]] for cell, size in zip(row, sizes, strict=True)]
        for lines in itertools.zip_longest(*folded, fillvalue=[]):
            line: _Line = [(" " * (_INDENT - _BETWEEN), "")]
            for text, size, on_right in zip(lines, sizes, right, strict=True):
                padding = (" " * (size - sum(len(part) for part, _ in text)), "")
                line += [(" " * _BETWEEN, ""), *([padding, *text] if on_right else [*text, padding])]
            yield line


def _folded(words: Words, width: int) -> Iterator[_Line]:
    """Yield lines of at most `width` columns, broken between words, else after a slash, else anywhere."""
    line: _Line = []
    used = 0
    for phrase in (Phrase(text=words),) if isinstance(words, str) else words:
        for token in re.findall(r"\S+\s*|\s+", phrase.text):
            for piece in _broken(token, width):
                if used and used + len(piece.rstrip()) > width:
                    yield line
                    line, used = [], 0
                fits = piece[: width - used]
                line.append((fits, _STYLES[phrase.tone]))
                used += len(fits)
    if line:
        yield line


def _broken(token: str, width: int) -> list[str]:
    if len(token.rstrip()) <= width:
        return [token]
    return re.findall(rf".{{1,{width}}}(?:(?<=/)|$)|.{{1,{width}}}", token.rstrip())
