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
    Chapter,
    Column,
    Cut,
    Document,
    Drawing,
    Entry,
    List,
    Phrase,
    Table,
    Text,
    Track,
    Words,
    plain,
    spec_in_words,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

# A line is pieces of text, each with a style of rich.
_Line = list[tuple[str, str]]

_STYLES = {"": "", "strong": "bold", "soft": "dim", "code": "dim", "good": "green", "bad": "yellow"}
# Beyond this many columns the eye loses its line.
_WIDEST = 120
_MARGIN, _INDENT, _BETWEEN = 2, 2, 2
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
    if document.figures:
        cells = [
            (figure.name, figure.value, (Phrase(text=figure.detail, tone="soft"),))
            for figure in document.figures
        ]
        yield from _table(
            Table(columns=(Column(),) * 3, entries=tuple(Entry(cells=row) for row in cells)), width
        )
    for warning in document.warnings:
        yield from _folded((Phrase(text=warning, tone="bad"),), width)
    for chapter in document.chapters:
        if not chapter.page_only:
            yield from _chapter(chapter, width)


def _chapter(chapter: Chapter, width: int) -> Iterator[_Line]:
    yield []
    yield from _folded((Phrase(text=chapter.title, tone="strong"),), width)
    for block in chapter.blocks:
        match block:
            case Text():
                yield from [] if block.page_only else _indented(block.words, width, _MARGIN)
            case List():
                for item in [*block.items[: block.most], *_more(len(block.items) - block.most)]:
                    yield from _hanging(item, width)
            case Bars():
                yield from _bars(block, width)
            case Table():
                yield from _table(block, width)
            case Drawing():
                lines = [*block.art, *([block.caption] if block.caption else [])]
                yield from ([(" " * _MARGIN + line, "")] for line in lines)


def _more(left: int) -> list[str]:
    return [f"and {left} more"] if left > 0 else []


def _indented(words: Words, width: int, by: int, style: str = "") -> Iterator[_Line]:
    for line in _folded(words, width - by, style):
        yield [(" " * by, ""), *line]


def _hanging(words: Words, width: int) -> Iterator[_Line]:
    """Yield an item of a list, its further lines farther in."""
    for number, line in enumerate(_folded(words, width - _MARGIN - _INDENT)):
        yield [(" " * (_MARGIN + _INDENT * bool(number)), ""), *line]


def _bars(block: Bars, width: int) -> Iterator[_Line]:
    shown = list(block.bars[: block.most])
    if len(block.bars) > block.most:
        shown.append(block.rest or Bar(name=f"and {len(block.bars) - block.most} more", figures=()))
    heads = list(block.head)
    if any(len(bar.tracks) > 1 for bar in shown):
        # Both bars of a row stand in one line, one in its upper half.
        heads[:2] = [f"▀ {heads[0]}", f"▄ {heads[1]}"]
    count = max((len(bar.figures) for bar in shown), default=0)
    columns = [
        [bar.figures[n] for bar in shown if n < len(bar.figures)] + heads[n : n + 1] for n in range(count)
    ]
    sizes = [max(map(len, column), default=0) for column in columns]
    figures = sum(_BETWEEN + size for size in sizes)
    name = max(_MARGIN + _INDENT * bar.depth + len(bar.name) for bar in shown)
    name = min(name, max(width - figures, 2 * _BAR))
    bar_width = min(_BAR, width - name - figures - _BETWEEN)
    if heads:
        yield _row(
            [" " * name, *(f"{head:>{size}}" for head, size in zip(heads, sizes, strict=False))], "dim"
        )
    for bar in shown:
        indent = _MARGIN + _INDENT * bar.depth
        first, *further = _indented(bar.name, name, indent, _STYLES[bar.tone])
        padding = " " * (name - sum(len(text) for text, _ in first))
        cells = [padding, *(f"{text:>{size}}" for text, size in zip(bar.figures, sizes, strict=False))]
        line = [*first, *_row(cells, "dim" if bar.tone == "soft" else "")]
        if bar_width >= _LEAST_BAR and bar.tracks:
            line.append((" " * _BETWEEN + _drawn(bar.tracks, bar_width), ""))
        yield line
        yield from further
        for note in bar.notes:
            yield from _indented(note, width, indent + _INDENT, "dim" if isinstance(note, str) else "")


def _row(cells: Iterable[str], style: str) -> _Line:
    return [((" " * _BETWEEN).join(cells), style)]


def _drawn(tracks: Sequence[Track], width: int) -> str:
    """Draw one bar, hidden parts in another tone; of two the first in the upper half of the line."""

    def cells(part: float) -> int:
        return max(round(part * width), 1) if part else 0

    *above, track = tracks
    solid = cells(sum(one.part for one in track if "hidden" not in one.kind))
    whole = cells(sum(one.part for one in track))
    upper = cells(sum(one.part for one in above[0])) if above else solid
    if not above and 0.0 < sum(one.part for one in track) * width < 0.5:
        return "▏"
    marks = {(True, True): "█", (True, False): "▀", (False, True): "▄"}
    return "".join(marks.get((n < upper, n < solid), "░") for n in range(max(upper, whole)))


def _table(table: Table, width: int) -> Iterator[_Line]:
    shown = list(_most(table))
    columns = list(_columns(table, [one for one in shown if isinstance(one, Entry)]))
    heads = [Phrase(text=column.name, tone="soft") for column, _ in columns]
    cells = [[(head,), *rest] for head, (_, rest) in zip(heads, columns, strict=True)]
    sizes = _widths([column for column, _ in columns], cells, width - _MARGIN)
    rows = zip(*cells, strict=True)
    head = next(rows)
    for one in [head, *shown] if any(column.name for column, _ in columns) else shown:
        if isinstance(one, str):
            yield [(" " * _MARGIN + one, "")]
            continue
        row = head if one is head else next(rows)
        folded = [list(_folded(cell, size)) or [[]] for cell, size in zip(row, sizes, strict=True)]
        for lines in itertools.zip_longest(*folded, fillvalue=[]):
            line: _Line = [(" " * (_MARGIN - _BETWEEN), "")]
            for (column, _), size, text in zip(columns, sizes, lines, strict=True):
                free = (" " * (size - sum(len(part) for part, _ in text)), "")
                line.append((" " * _BETWEEN, ""))
                line += [free, *text] if column.figures else [*text, free]
            yield line


def _most(table: Table) -> Iterator[Entry | str]:
    """Yield so many rows of each group as are shown, and how many more there are."""
    counts = Counter(entry.group for entry in table.entries)
    seen: Counter[str] = Counter()
    for entry in table.entries:
        seen[entry.group] += 1
        if seen[entry.group] <= table.most:
            yield entry
        elif seen[entry.group] == counts[entry.group]:
            yield f"and {counts[entry.group] - table.most} more {entry.group}".strip()


def _columns(table: Table, entries: Sequence[Entry]) -> Iterator[tuple[Column, list[Words]]]:
    """Yield what is shown of each column; a shape and what cuts it are a column each."""
    for number, column in enumerate(table.columns):
        cells = [entry.cells[number] for entry in entries]
        cuts = [cell for cell in cells if isinstance(cell, Cut)]
        if cuts:
            yield Column(name=column.name, figures=True), ["x".join(map(str, cut.shape)) for cut in cuts]
            yield Column(name="cut by"), [spec_in_words(cut.axes) for cut in cuts]
        elif not column.page_only:
            yield column, [cell for cell in cells if not isinstance(cell, Cut)]


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[Words]], width: int) -> list[int]:
    """Return the width of each column: figures take what they need, words share evenly what is left."""
    sizes = [max(len(plain(cell)) for cell in column) for column in cells]
    words = sorted((n for n, column in enumerate(columns) if not column.figures), key=lambda n: sizes[n])
    free = width - _BETWEEN * (len(columns) - 1) - sum(sizes) + sum(sizes[n] for n in words)
    for place, n in enumerate(words):
        sizes[n] = max(min(sizes[n], free // (len(words) - place)), 1)
        free -= sizes[n]
    return sizes


def _folded(words: Words, width: int, style: str = "") -> Iterator[_Line]:
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
                line.append((fits, style or _STYLES[phrase.tone]))
                used += len(fits)
    if line:
        yield line


def _broken(token: str, width: int) -> list[str]:
    if len(token.rstrip()) <= width:
        return [token]
    return re.findall(rf".{{1,{width}}}(?:(?<=/)|$)|.{{1,{width}}}", token.rstrip())
