"""Prints a document as HTML: a fragment for notebooks, and a page that needs no other file and no network."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from .document import (
    Bar,
    Bars,
    Chapter,
    Column,
    Cut,
    Document,
    Drawing,
    Entry,
    Figure,
    List,
    Phrase,
    Table,
    Text,
    Tone,
    Track,
    Words,
)

_STYLE = pathlib.Path(__file__).with_name("page.css")
_CLASS = ".meshwright-plan"
# A page shows so many times the rows that a terminal does, and the others to who asks.
_EARLY = 2
_TAGS = {"strong": "b", "soft": "small", "code": "code", "good": "em", "bad": "strong"}


def page(document: Document) -> str:
    """Return a whole HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(document.name)}</title>"
        "<style>body{margin:0;padding:2rem 1rem;background:#eef1f6}"
        ".meshwright-plan{max-width:72rem;margin:auto}"
        "@media (prefers-color-scheme:dark){body{background:#0d1016}}</style>"
        f"</head><body>{fragment(document)}</body></html>\n"
    )


def fragment(document: Document) -> str:
    """Return the part of a page that shows `document`; its style holds for nothing outside of it."""
    figures = "".join(map(_figure, document.figures))
    header = f"<h1>{escape(document.title)}</h1>" + (f'<dl class="figures">{figures}</dl>' if figures else "")
    header += "".join(f'<p class="warning">{escape(warning)}</p>' for warning in document.warnings)
    chapters = "".join(map(_chapter, document.chapters))
    # Notebooks lay tables, lists and headings out by selectors of up to two classes: ours have three.
    style = _STYLE.read_text(encoding="utf-8").replace(_CLASS, 3 * _CLASS)
    return f'<style>{style}</style><div class="meshwright-plan"><header>{header}</header>{chapters}</div>'


def _figure(figure: Figure) -> str:
    detail = f"<dd><small>{escape(figure.detail)}</small></dd>" if figure.detail else ""
    return f"<div><dt>{escape(figure.name)}</dt><dd>{escape(figure.value)}</dd>{detail}</div>"


def _chapter(chapter: Chapter) -> str:
    title = chapter.title[:1].upper() + chapter.title[1:]
    content = ""
    for drawn, blocks in itertools.groupby(chapter.blocks, lambda block: isinstance(block, Drawing)):
        some = "".join(map(_block, blocks))
        # Drawings beside one another, as many as there is place for.
        content += f'<div class="drawings">{some}</div>' if drawn else some
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _block(block: Text | List | Bars | Table | Drawing) -> str:
    match block:
        case Text():
            return f"<p>{_words(block.words)}</p>"
        case List():
            return f"<ul>{''.join(f'<li>{_words(item)}</li>' for item in block.items)}</ul>"
        case Bars():
            return _bars(block)
        case Table():
            return _table(block)
        case Drawing():
            return _drawing(block)


def _drawing(block: Drawing) -> str:
    note = f" <small>({escape(block.note)})</small>" if block.note else ""
    caption = f"<figcaption>{escape(block.caption)}{note}</figcaption>" if block.caption or note else ""
    return f"<figure>{block.svg}{caption}{_legend(block.legend)}</figure>"


def _legend(legend: Mapping[str, str]) -> str:
    items = "".join(f'<li><i class="{kind}"></i>{escape(words)}</li>' for kind, words in legend.items())
    return f'<ul class="legend">{items}</ul>' if items else ""


def _bars(block: Bars) -> str:
    count = max((len(bar.figures) for bar in block.bars), default=0)
    heads = "".join(f'<th class="n">{escape(head)}</th>' for head in (*block.head, *[""] * count)[:count])
    head = f"<tr><th></th>{heads}<th></th></tr>" if block.head else ""
    kind = "bars noted" if any(bar.notes for bar in block.bars) else "bars"
    rows = [(f"d{bar.depth} {bar.tone}", _bar(bar, count)) for bar in block.bars]
    return _legend(block.legend) + _grid(kind, head, rows, block.most)


def _bar(bar: Bar, count: int) -> str:
    figures = "".join(f'<td class="n">{escape(text)}</td>' for text in (*bar.figures, *[""] * count)[:count])
    notes = "".join(f"<div>{_words(note, 'soft')}</div>" for note in bar.notes)
    tracks = "".join(f"<div>{_track(track)}</div>" for track in bar.tracks)
    name = f'<th scope="row">{_words(bar.name, bar.tone)}{notes}</th>'
    return f'{name}{figures}<td class="track">{tracks}</td>'


def _track(track: Track) -> str:
    return "".join(f'<i class="{one.kind}" style="width:{100 * one.part:.2f}%"></i>' for one in track)


def _table(table: Table) -> str:
    keys = any(entry.key for entry in table.entries)
    heads = "".join(f"<th{_side(column)}>{escape(column.name)}</th>" for column in table.columns)
    named = any(column.name for column in table.columns)
    head = f"<tr>{'<th></th>' if keys else ''}{heads}</tr>" if named else ""
    rows = [("", _entry(entry, table.columns, keys)) for entry in table.entries]
    return _grid("cells", head, rows, table.most)


def _entry(entry: Entry, columns: Iterable[Column], keys: bool) -> str:
    key = f'<td><i class="key {entry.key}"></i></td>' if keys else ""
    return key + "".join(
        f"<td{_side(column)}>{_cut(cell) if isinstance(cell, Cut) else _words(cell)}</td>"
        for cell, column in zip(entry.cells, columns, strict=True)
    )


def _grid(kind: str, head: str, rows: Sequence[tuple[str, str]], most: int) -> str:
    """Write rows of (class, cells); those far beyond what a terminal shows wait to be asked for."""
    early = _EARLY * most
    body = "".join(
        f'<tr class="{of}{" late" if number >= early else ""}">{cells}</tr>'
        for number, (of, cells) in enumerate(rows)
    )
    table = f'<div class="wide"><table class="{kind}">{head}{body}</table></div>'
    if len(rows) <= early:
        return table
    more = f'<label class="more"><input type="checkbox">{len(rows) - early} more</label>'
    return f'<div class="long">{table}{more}</div>'


def _side(column: Column) -> str:
    return ' class="n"' if column.figures else ""


def _cut(cut: Cut) -> str:
    dims = "".join(
        f'<span class="{"cut" if axes else "kept"}">{size:,}{_words(" x ".join(axes), "soft")}</span>'
        for size, axes in zip(cut.shape, cut.axes, strict=True)
    )
    return f'<div class="dims">{dims}</div>'


def _words(words: Words, tone: Tone = "") -> str:
    """Write words, in `tone` if they have none of their own."""
    phrases = (Phrase(text=words, tone=tone),) if isinstance(words, str) else words
    return "".join(
        f"<{_TAGS[one.tone]}>{escape(one.text)}</{_TAGS[one.tone]}>"
        if one.tone and one.text
        else escape(one.text)
        for one in phrases
    )
