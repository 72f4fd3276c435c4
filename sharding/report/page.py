"""A Plan as HTML: a fragment for notebooks and a self-contained page, from no other file and no network."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..words import gib, seconds
from .compiled_page import compiled_sections
from .compiled_view import Compiled, compiled_view
from .mesh_drawing import mesh_drawings
from .scatter import scatter
from .view import Bar, Parameter, View, view

if TYPE_CHECKING:
    from ..plans.record import Record

_STYLE = pathlib.Path(__file__).with_name("page.css")
_PARAMETERS = 200


def page(plan: Record) -> str:
    """Return a whole HTML document that shows `plan`."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Plan for {escape(str(plan.topology))}</title>"
        "<style>body{margin:0;padding:2rem 1rem}.meshwright-plan{max-width:72rem;margin:auto}</style>"
        f"</head><body>{fragment(plan)}</body></html>\n"
    )


def write_page(plan: Record, path: str | pathlib.Path) -> None:
    """Write `page(plan)` to `path`. Raises OSError where that cannot be written."""
    pathlib.Path(path).write_text(page(plan), encoding="utf-8")


def fragment(plan: Record) -> str:
    """Return the part of a document that shows `plan`; its style holds for nothing outside of it."""
    shown, compiled = view(plan), compiled_view(plan)
    estimated = "" if compiled is None else ", estimated"
    sections = [
        _header(shown, compiled),
        _section("Mesh", _mesh(shown)),
        _section(f"A step{estimated}: {shown.step}", _bars(shown.time)) if shown.time else "",
        _section(_memory_title(shown, estimated), _memory(shown)) if shown.memory else "",
        *_compiled(compiled, shown),
        _section("What else there was", _rivals(shown)) if len(shown.rivals) > 1 else "",
        _section("Dimensions while computing", _dims(shown)),
        _section("Parameters as stored", _parameters(shown)),
        _section("Notes", _list(shown.notes)) if shown.notes else "",
    ]
    style = _STYLE.read_text(encoding="utf-8")
    return f'<style>{style}</style><div class="meshwright-plan">{"".join(sections)}</div>'


def _compiled(compiled: Compiled | None, shown: View) -> list[str]:
    sections = [] if compiled is None else compiled_sections(compiled, shown.capacity_bytes)
    return [_section(title, content) for title, content in sections]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _header(shown: View, compiled: Compiled | None) -> str:
    figures = [("topology", str(shown.topology)), ("devices", f"{shown.topology.num_devices:,}")]
    if shown.step:
        figures += [("step", shown.step), ("of the peak", shown.mfu), ("memory", shown.peak)]
    if compiled is not None:
        figures += [(f"{pair.name}, compiled", pair.texts()[1]) for pair in compiled.totals]
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in figures)
    return f'<header><h1>{escape(shown.layout)}</h1><dl class="figures">{cells}</dl></header>'


def _mesh(shown: View) -> str:
    drawn = {line.split("=")[0]: line for line in shown.links}
    figures = [
        f"<figure>{svg}<figcaption>{escape(drawn.get(axis, axis))}"
        f"{' <small>(not drawn: ' + escape(left_out) + ')</small>' if left_out else ''}</figcaption></figure>"
        for axis, svg, left_out in mesh_drawings(shown.mesh, shown.topology)
    ]
    if not figures:
        return "<p>One device.</p>"
    return (
        "<p>Each square is a device where it stands; its colour is its place along the axis.</p>"
        f'<div class="meshes">{"".join(figures)}</div>'
    )


def _bars(bars: Sequence[Bar]) -> str:
    most = max((bar.share for bar in bars), default=1.0)
    rows = "".join(
        f'<tr><th scope="row">{escape(bar.name)}</th><td class="n">{escape(bar.text)}</td>'
        f'<td class="n">{bar.share:.1%}</td><td class="track"><div class="bar {_kind(bar.name)}" '
        f'style="width:{100 * bar.share / most:.2f}%"></div></td></tr>'
        for bar in bars
    )
    return f'<table class="bars">{rows}</table>'


def _kind(name: str) -> str:
    """Return the class that colours an item: computing, talking, waiting or what is held."""
    if name.startswith("compute/") or name == "optimizer":
        return "compute"
    return "talk" if "/" in name else "other"


def _memory_title(shown: View, estimated: str) -> str:
    of = "" if shown.capacity_bytes is None else f" of {gib(shown.capacity_bytes)}"
    return f"A device's memory{estimated}: {shown.peak}{of}"


def _memory(shown: View) -> str:
    whole = max(shown.capacity_bytes or 0.0, shown.peak_bytes)
    pieces = "".join(
        f'<div class="m{n % 8}" style="width:{100 * bar.size / whole:.3f}%" '
        f'title="{escape(bar.name)} {escape(bar.text)}"></div>'
        for n, bar in enumerate(shown.memory)
    )
    legend = "".join(
        f'<li><i class="m{n % 8}"></i>{escape(bar.name)} {escape(bar.text)}</li>'
        for n, bar in enumerate(shown.memory)
    )
    return f'<div class="stack">{pieces}</div><ul class="legend">{legend}</ul>'


def _rivals(shown: View) -> str:
    rows = "".join(
        f"<tr><td>{escape(rival.layout)}{', ' + escape(rival.storage) if rival.storage else ''}</td>"
        f'<td class="n">{escape(seconds(rival.step_seconds))}</td>'
        f'<td class="n">{escape(gib(rival.peak_bytes))}</td>'
        f"<td>{escape(rival.lost) or '<b>chosen</b>'}</td></tr>"
        for rival in shown.rivals
    )
    head = "<tr><th>layout</th><th>step</th><th>memory</th><th>why not</th></tr>"
    return (
        scatter(shown.rivals, shown.capacity_bytes) + f'<div class="wide"><table>{head}{rows}</table></div>'
    )


def _dims(shown: View) -> str:
    cut = [(name, size, axes) for name, size, axes in shown.dims if axes]
    whole = [f"{name}={size}" for name, size, axes in shown.dims if not axes]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="n">{size:,}</td>'
        f"<td>{escape(' x '.join(f'{axis}={shown.mesh[axis]}' for axis in axes))}</td></tr>"
        for name, size, axes in cut
    )
    rest = f"<p>Whole on every device: {escape(', '.join(whole))}.</p>" if whole else ""
    return f"<table>{rows}</table>{rest}"


def _parameters(shown: View) -> str:
    by_size = sorted(shown.parameters, key=lambda row: -row.bytes_whole)
    rows = "".join(_parameter(row) for row in by_size[:_PARAMETERS])
    left = len(by_size) - _PARAMETERS
    more = f"<p>{left} smaller ones are not shown.</p>" if left > 0 else ""
    head = "<tr><th>parameter</th><th>shape, and what cuts it</th><th>on a device</th><th>in all</th></tr>"
    return f'<div class="wide"><table>{head}{rows}</table></div>{more}'


def _parameter(row: Parameter) -> str:
    dims = "".join(
        f'<span class="{"cut" if axes else "kept"}">{size:,}'
        f"{'<small>' + escape(' x '.join(axes)) + '</small>' if axes else ''}</span>"
        for size, axes in zip(row.shape, row.cuts, strict=True)
    )
    return (
        f'<tr><td><code>{escape(row.path)}</code></td><td class="dims">{dims}</td>'
        f'<td class="n">{gib(row.bytes_device)}</td><td class="n">{gib(row.bytes_whole)}</td></tr>'
    )


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
