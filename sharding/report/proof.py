"""What the compiler made of a plan: memory through the step, collectives, findings, the costliest lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..hlo.text import SourceLine
from ..plans.proof import CompiledCollective, Finding, Proof, nearby
from ..words import gib, seconds
from .document import (
    Bar,
    Bars,
    Chapter,
    Column,
    Drawing,
    Entry,
    Phrase,
    Segment,
    Table,
    Words,
    size_text,
    time_text,
)
from .drawings import memory_timeline, timeline_art

# Distributions that all platforms have, so that they name no compiler unless there is no other.
_EVERYWHERE = ("jax", "jaxlib")
# What is added up of collectives that are alike.
SUMS = ("count", "bytes", "seconds", "exposed_seconds")
_COLLECTIVES, _FINDINGS, _BUFFERS, _LINES = 8, 8, 6, 6


def proof_chapters(proof: Proof, capacity_bytes: float | None) -> list[Chapter]:
    """Return what a proof shows beside time and memory in all; `capacity_bytes` is what a device has."""
    return [
        _timeline(proof, capacity_bytes),
        _buffers(proof),
        _collectives(proof.collectives),
        _findings(proof),
        _lines(proof),
    ]


def compiler_of(versions: Mapping[str, str]) -> str:
    """Return the compiler's name and version: that of a platform's own distribution, else that of jaxlib.

    >>> compiler_of({"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1"})
    'libtpu 0.0.42.1'
    """
    own = [name for name in versions if name not in _EVERYWHERE] or [n for n in _EVERYWHERE if n in versions]
    return f"{own[-1]} {versions[own[-1]]}" if own else "XLA"


def place(source: SourceLine | None, *, function: bool = False) -> str:
    """Write a source line as ``models/block.py:88``: below the working directory, or with one folder.

    Nothing where it is not known; with `function`, whose line it is as well.
    """
    if source is None:
        return ""
    of = f" {source.function}" if function and source.function else ""
    return f"{nearby(source.file)}:{source.line}{of}"


def by_kind(collectives: Iterable[CompiledCollective]) -> dict[str, dict[str, float]]:
    """Return ``kind/axes``, as items of time are named → the `SUMS` of all such collectives."""
    found: dict[str, dict[str, float]] = {}
    for row in collectives:
        sums = found.setdefault(_name(row), dict.fromkeys(SUMS, 0.0))
        for field in SUMS:
            sums[field] += getattr(row, field)
    return found


def costliest(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings by the seconds that they cost, then by the bytes."""
    return sorted(findings, key=lambda row: (-row.seconds, -row.bytes))


def cost(row: Finding) -> str:
    """Write what a finding costs: seconds of a step, else bytes of a device, else nothing."""
    return seconds(row.seconds) if row.seconds else size_text(row.bytes) if row.bytes else ""


def _name(row: CompiledCollective) -> str:
    return f"{row.kind}/{'×'.join(row.axes) or 'none'}"


def _timeline(proof: Proof, capacity_bytes: float | None) -> Chapter:
    largest = [(f"{what} {where}".strip(), size) for what, where, size in _largest(proof)]
    drawing = Drawing(
        svg=memory_timeline(proof.timeline, largest, capacity_bytes),
        art=timeline_art(proof.timeline, capacity_bytes),
    )
    return Chapter(title="memory through the step", blocks=(drawing,) if proof.timeline else ())


def _largest(proof: Proof) -> list[tuple[str, str, float]]:
    """Return (what, where it is made, bytes) of the buffers at the peak, the largest first."""
    rows = sorted(proof.buffers, key=lambda row: -row.bytes)
    return [(f"{row.name} {row.shape}".strip(), place(row.source), row.bytes) for row in rows]


def _buffers(proof: Proof) -> Chapter:
    entries = tuple(
        Entry(cells=(gib(size), what, (Phrase(text=where, tone="code"),)), key=f"m{number % 8}")
        for number, (what, where, size) in enumerate(_largest(proof))
    )
    columns = (Column(name="held", figures=True), Column(name="what"), Column(name="made by"))
    table = Table(columns=columns, entries=entries, most=_BUFFERS)
    return Chapter(title="largest when memory is fullest", blocks=(table,) if entries else ())


def _collectives(collectives: Sequence[CompiledCollective]) -> Chapter:
    rows = sorted(collectives, key=lambda row: (-row.seconds, -row.bytes))
    most = max((row.seconds for row in rows), default=0.0) or 1.0
    bars = []
    for row in rows:
        exposed = min(row.exposed_seconds, row.seconds)
        track = (
            Segment(part=exposed / most, kind="talk"),
            Segment(part=(row.seconds - exposed) / most, kind="talk hidden"),
        )
        bars.append(
            Bar(
                name=_name(row),
                figures=_figures({field: getattr(row, field) for field in SUMS}),
                tracks=(tuple(one for one in track if one.part > 0.0),),
                notes=(_how(row), *(((Phrase(text=place(row.source), tone="code"),),) if row.source else ())),
            )
        )
    left = rows[_COLLECTIVES:]
    sums = {field: sum(getattr(row, field) for row in left) for field in SUMS}
    block = Bars(
        bars=tuple(bars),
        head=("times", "bytes", "links busy", "exposed"),
        legend={"talk": "computing waits", "talk hidden": "beside computing"},
        most=_COLLECTIVES,
        rest=Bar(name=f"and {len(left)} more", figures=_figures(sums)),
    )
    return Chapter(title="collectives as compiled, of one device in a step", blocks=(block,) if bars else ())


def _figures(sums: Mapping[str, float]) -> tuple[str, str, str, str]:
    times = (time_text(sums["seconds"]), time_text(sums["exposed_seconds"]))
    return f"{sums['count']:,.0f}", size_text(sums["bytes"]), *times


def _how(row: CompiledCollective) -> str:
    """Say how a collective runs: by which algorithm, beside what."""
    if row.asynchronous:
        hidden = 1.0 - row.exposed_seconds / row.seconds if row.seconds else 1.0
        beside = f"asynchronous, {max(hidden, 0.0):.0%} beside computing"
    else:
        beside = "synchronous"
    return ", ".join(filter(None, (beside, row.algorithm)))


def _findings(proof: Proof) -> Chapter:
    rows = costliest(proof.findings)
    most_seconds = max((row.seconds for row in rows), default=0.0)
    most_bytes = max((row.bytes for row in rows if not row.seconds), default=0.0)
    said: set[str] = set()
    bars = []
    for row in rows:
        size, most = (row.seconds, most_seconds) if row.seconds else (row.bytes, most_bytes)
        whole, of = (proof.step_seconds, "the step") if row.seconds else (proof.peak_bytes, "the memory")
        share = f"{min(size / whole, 1.0):.1%} of {of}" if whole and size else ""
        notes: list[Words] = [(Phrase(text=row.what), Phrase(text=_beside(row.source), tone="soft"))]
        if row.remedy:
            remedy = "as above" if row.remedy in said else row.remedy
            notes.append((Phrase(text=f"→ {remedy}", tone="good"),))
            said.add(row.remedy)
        bars.append(
            Bar(
                name=row.kind.replace("_", " "),
                figures=(cost(row), share),
                tracks=((Segment(part=size / (most or 1.0), kind="bad"),) if size else (),),
                tone="strong",
                notes=tuple(notes),
            )
        )
    return Chapter(title="findings", blocks=(Bars(bars=tuple(bars), most=_FINDINGS),) if bars else ())


def _beside(source: SourceLine | None) -> str:
    return f" ({place(source)})" if source else ""


def finding_in_words(row: Finding) -> str:
    """Write a finding in one sentence: what, where, at which cost, and what to do."""
    unit = " a step" if row.seconds else ""
    costs = f", {cost(row)}{unit}" if cost(row) else ""
    return f"{row.what}{_beside(row.source)}{costs}" + (f"; {row.remedy}" if row.remedy else "")


def _lines(proof: Proof) -> Chapter:
    rows = sorted(proof.lines, key=lambda row: -row.seconds)
    bars = tuple(
        Bar(
            name=place(row.source, function=True),
            figures=(seconds(row.seconds),),
            tracks=((Segment(part=row.seconds / (rows[0].seconds or 1.0), kind="compute"),),),
            tone="code",
        )
        for row in rows
    )
    return Chapter(title="costliest lines", blocks=(Bars(bars=bars, most=_LINES),) if bars else ())
