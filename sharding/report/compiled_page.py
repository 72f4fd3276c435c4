"""What the compiler made of a plan, as parts of an HTML page: pictures from markup and style alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..words import gib, seconds
from .compiled_view import Compiled, Pair, cost, how, kind_of, over, place, size_text, time_text
from .memory_drawing import memory_drawing

_BUFFERS, _LINES, _COLLECTIVES, _FINDINGS = 12, 12, 40, 40


def compiled_sections(shown: Compiled, capacity_bytes: float | None) -> list[tuple[str, str]]:
    """Return (title, HTML) of each section that shows `shown`."""
    title = shown.title[0].upper() + shown.title[1:]
    sections = [
        (title, _totals(shown.totals) + _pairs(shown.time)),
        ("Memory through the step", _memory(shown, capacity_bytes)),
        ("Collectives as compiled", _collectives(shown) if shown.collectives else ""),
        ("Findings", _findings(shown) if shown.findings else ""),
        ("Costliest lines", _lines(shown) if shown.lines else ""),
    ]
    return [(name, content) for name, content in sections if content]


def _totals(totals: Sequence[Pair]) -> str:
    rows = ""
    for pair in totals:
        before, after, change = pair.texts()
        rows += (
            f'<tr><th scope="row">{escape(pair.name)}</th><td class="n">{before}</td>'
            f'<td class="n"><b>{after}</b></td><td class="n">{change}</td></tr>'
        )
    head = "<tr><th></th><th>estimated</th><th>compiled</th><th>difference</th></tr>"
    return f'<table class="totals">{head}{rows}</table>'


def _pairs(pairs: Sequence[Pair]) -> str:
    """Draw each item as two bars: estimated above, compiled below, hidden parts hatched."""
    most = max((pair.largest for pair in pairs), default=0.0) or 1.0

    def bar(size: float | None, kind: str, words: str) -> str:
        if not size:
            return ""
        return f'<i class="{kind}" style="width:{100 * size / most:.2f}%" title="{escape(words)}"></i>'

    rows = ""
    for pair in pairs:
        before, after, change = pair.texts()
        kind = "talk" if "/" in pair.name else "compute" if pair.name == "compute" else "other"
        compiled = bar(pair.compiled, kind, f"{pair.name} compiled: {after}")
        hidden = bar(pair.hidden, f"{kind} hidden", f"{pair.name} beside computing: {time_text(pair.hidden)}")
        rows += (
            f'<tr><th scope="row">{escape(pair.name)}</th><td class="n">{before}</td>'
            f'<td class="n">{after}</td><td class="n">{change}</td><td class="track pair">'
            f"<div>{bar(pair.estimated, 'before', f'{pair.name} estimated: {before}')}</div>"
            f"<div>{compiled}{hidden}</div></td></tr>"
        )
    legend = (
        '<ul class="legend"><li><i class="before"></i>estimated</li><li><i class="compute"></i>computing, '
        'compiled</li><li><i class="talk"></i>collectives that computing waits for</li>'
        '<li><i class="talk hidden"></i>collectives that run beside it</li></ul>'
    )
    head = "<tr><th></th><th>estimated</th><th>compiled</th><th></th><th></th></tr>"
    return f'{legend}<div class="wide"><table class="bars">{head}{rows}</table></div>'


def _memory(shown: Compiled, capacity_bytes: float | None) -> str:
    rows = "".join(
        f'<tr><td><i class="key m{n % 8}"></i></td><td class="n">{gib(size)}</td>'
        f"<td>{escape(what)}</td><td><code>{escape(where)}</code></td></tr>"
        for n, (what, where, size) in enumerate(shown.buffers[:_BUFFERS])
    )
    head = "<tr><th></th><th>held</th><th>when memory is fullest</th><th>made by</th></tr>"
    buffers = f'<div class="wide"><table>{head}{rows}</table></div>' if rows else ""
    drawing = memory_drawing(shown, capacity_bytes)
    return (f'<div class="wide">{drawing}</div>' if drawing else "") + _totals(shown.memory) + buffers


def _collectives(shown: Compiled) -> str:
    most = max(row.seconds for row in shown.collectives) or 1.0
    rows = ""
    for row in shown.collectives[:_COLLECTIVES]:
        exposed = min(row.exposed_seconds, row.seconds)
        bars = "".join(
            f'<i class="{kind}" style="width:{100 * size / most:.2f}%" title="{words}: {seconds(size)}"></i>'
            for size, kind, words in (
                (exposed, "talk", "computing waits"),
                (row.seconds - exposed, "talk hidden", "beside computing"),
            )
            if size > 0
        )
        where = f"<br><code>{escape(place(row.source))}</code>" if row.source else ""
        rows += (
            f"<tr><td>{escape(f'{row.kind}/{over(row.axes)}')}<br><small>{escape(how(row))}{where}</small></td>"
            f'<td class="n">{row.count:,.0f}</td><td class="n">{size_text(row.bytes)}</td>'
            f'<td class="n">{time_text(row.seconds)}</td><td class="n">{time_text(row.exposed_seconds)}</td>'
            f'<td class="track pair"><div>{bars}</div></td></tr>'
        )
    head = (
        "<tr><th>kind and mesh axes</th><th>times</th><th>bytes</th><th>links busy</th><th>exposed</th>"
        "<th></th></tr>"
    )
    return f'<div class="wide"><table class="bars talks">{head}{rows}</table></div>' + _more(
        len(shown.collectives) - _COLLECTIVES
    )


def _findings(shown: Compiled) -> str:
    """List findings, each with a bar by its seconds, or by its bytes where it costs no time."""
    most_seconds = max(row.seconds for row in shown.findings)
    most_bytes = max((row.bytes for row in shown.findings if not row.seconds), default=0.0)
    rows, said = "", set[str]()
    for row in shown.findings[:_FINDINGS]:
        whole = shown.step_seconds if row.seconds else shown.peak_bytes
        part = min((row.seconds or row.bytes) / whole, 1.0) if whole else 0.0
        of = "the step" if row.seconds else "the memory"
        where = f" <code>{escape(place(row.source))}</code>" if row.source else ""
        words = "as above" if row.remedy in said else escape(row.remedy)
        remedy = f'<br><span class="remedy">{words}</span>' if row.remedy else ""
        said.add(row.remedy)
        most = most_seconds if row.seconds else most_bytes
        width = f"width:{100 * (row.seconds or row.bytes) / (most or 1.0):.1f}%"
        gauge = f'<div class="gauge" title="{part:.1%} of {of}"><i style="{width}"></i></div>'
        share = gauge if part else ""
        rows += (
            f'<tr><td class="n">{escape(cost(row))}{share}</td>'
            f"<td><b>{escape(kind_of(row))}</b>: {escape(row.what)}{where}{remedy}</td></tr>"
        )
    return f'<table class="findings">{rows}</table>' + _more(len(shown.findings) - _FINDINGS)


def _lines(shown: Compiled) -> str:
    most = max(time for _, time in shown.lines) or 1.0
    rows = "".join(
        f'<tr><td><code>{escape(where)}</code></td><td class="n">{seconds(time)}</td>'
        f'<td class="track pair"><div>'
        f'<i class="compute" style="width:{100 * time / most:.2f}%"></i></div></td></tr>'
        for where, time in shown.lines[:_LINES]
    )
    return f'<div class="wide"><table class="bars">{rows}</table></div>' + _more(len(shown.lines) - _LINES)


def _more(left: int) -> str:
    return f"<p>{left} that cost less are not shown.</p>" if left > 0 else ""
