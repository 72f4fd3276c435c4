"""Two plans side by side as HTML, in the style of a plan's page."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from html import escape

from .compare import Both, Comparison, Costs
from .compare_view import choices, items, texts
from .compiled_view import size_text, time_text

_STYLE = pathlib.Path(__file__).with_name("page.css")
_HEAD = "<tr><th></th><th>A</th><th>B</th><th>B - A</th><th>B / A</th><th></th></tr>"


def comparison_fragment(shown: Comparison) -> str:
    """Return the part of a document that shows `shown`; its style holds for nothing outside of it."""
    sections = [_header(shown)]
    sections.append(_section("What they do differently", _choices(shown)))
    for title, costs in (("Estimated", shown.estimated), ("Compiled", shown.compiled)):
        if costs is not None:
            sections.append(_section(title, _costs(costs)))
    if shown.collectives:
        sections.append(_section("Collectives as compiled", _collectives(shown)))
    style = _STYLE.read_text(encoding="utf-8")
    return f'<style>{style}</style><div class="meshwright-plan">{"".join(sections)}</div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _header(shown: Comparison) -> str:
    rows = "".join(
        f'<tr><th scope="row"><i class="key {kind}"></i> <b>{letter}</b></th>'
        f"<td>{'' if name == letter else escape(name) + '<br>'}{escape(layout)}</td></tr>"
        for letter, kind, name, layout in zip(
            "AB", ("before", "compute"), shown.names, shown.layouts, strict=True
        )
    )
    unlike = "".join(f'<p class="unlike">{escape(sentence)}</p>' for sentence in shown.unlike)
    return f"<header><h1>Two plans</h1><table>{rows}</table>{unlike}</header>"


def _choices(shown: Comparison) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td>{escape(one)}</td><td>{escape(other)}</td></tr>'
        for _, label, one, other in choices(shown)
    )
    if not rows:
        return "<p>They choose alike.</p>"
    return (
        f'<div class="wide"><table class="totals"><tr><th></th><th>A</th><th>B</th></tr>{rows}</table></div>'
    )


def _costs(costs: Costs) -> str:
    rows = ""
    for name, whole, kind, write in (
        ("step", costs.step_seconds, "time", time_text),
        ("memory", costs.peak_bytes, "memory", size_text),
    ):
        most = max((size or 0.0 for size in whole), default=0.0)
        rows += _row(f"<b>{name}</b>", whole, write, most)
        rows += "".join(_row(escape(item), pair, write, most) for item, pair in items(costs, kind, whole))
    return f'<div class="wide"><table class="bars">{_HEAD}{rows}</table></div>'


def _collectives(shown: Comparison) -> str:
    most = max(max(size or 0.0 for size in sums["seconds"]) for sums in shown.collectives.values())
    rows = ""
    for name, sums in shown.collectives.items():
        rows += _row(escape(name), sums["seconds"], time_text, most)
        rows += _row("<small>exposed</small>", sums["exposed_seconds"], time_text, 0.0)
        rows += _row("<small>bytes</small>", sums["bytes"], size_text, 0.0)
        rows += _row("<small>times</small>", sums["count"], "{:,.0f}".format, 0.0)
    return f'<div class="wide"><table class="bars">{_HEAD}{rows}</table></div>'


def _row(name: str, pair: Both, write: Callable[[float], str], most: float) -> str:
    """Return a row of figures, and two bars of which `most` is as wide as there is place; none without it."""
    cells = "".join(f'<td class="n">{escape(text)}</td>' for text in texts(pair, write))
    bars = "".join(
        f'<div><i class="{kind}" style="width:{100 * size / most:.2f}%"></i></div>' if size and most else ""
        for size, kind in zip(pair, ("before", "compute"), strict=True)
    )
    return f'<tr><th scope="row">{name}</th>{cells}<td class="track pair">{bars}</td></tr>'
