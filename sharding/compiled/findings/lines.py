"""Findings about collectives, one of those of one kind, over the same axes, that one line makes."""

from __future__ import annotations

from collections.abc import Iterable

from ...hlo.text import SourceLine
from ...plans.proof import Finding
from ..evidence import Evidence, StepCollective

#: Findings below this share of a step are not shown: the estimates of seconds are no better than one per
#: cent.
MATTERS = 0.01
#: Collectives below this share of a step are part of another one, such as halo exchanges.
SMALL = 0.001
#: A collective overlaps nothing if at least this share of it is exposed; the rest is rounding and latency.
EXPOSED = 0.9


def by_line(
    evidence: Evidence,
    kind: str,
    chosen: Iterable[StepCollective],
    *,
    what: str,
    remedy: str,
    least: float = SMALL,
    saved: float = 1.0,
) -> list[Finding]:
    """Return a finding of `kind` for each line, axes and kind of the collectives that are `chosen`.

    `what` happened may say ``{collective}``, ``{axes}`` and how often a step in ``{runs}``. Those that expose
    no more than `least` of a step are left out. A remedy saves a share of what is exposed, `saved`.
    """
    sums: dict[tuple[str, str, SourceLine | None], list[float]] = {}
    for seen in chosen:
        axes = "×".join(seen.collective.axes) or "none"
        row = sums.setdefault((seen.collective.kind, axes, seen.source), [0.0, 0.0, 0.0])
        row[0] += seen.runs
        row[1] += seen.exposed_seconds
        row[2] += seen.collective.bytes * seen.runs
    # By kinds, and those of one in the order in which they are seen.
    rows = sorted(sums.items(), key=lambda row: row[0][0])
    return [
        Finding(
            kind=kind,
            what=what.format(collective=_in_words(collective), axes=axes, runs=f"{runs:.0f}"),
            remedy=remedy,
            seconds=exposed * saved,
            bytes=bytes_,
            source=source,
        )
        for (collective, axes, source), (runs, exposed, bytes_) in rows
        if exposed > least * evidence.step_seconds
    ]


def waits(seen: StepCollective) -> bool:
    """Whether nothing is computed beside a collective."""
    return bool(seen.seconds) and seen.exposed_seconds >= EXPOSED * seen.seconds


def is_send(seen: StepCollective) -> bool:
    """Whether stages hand something on."""
    return seen.collective.kind == "collective_permute" and "stage" in seen.collective.axes


def _in_words(collective: str) -> str:
    return collective.replace("_", "-")
