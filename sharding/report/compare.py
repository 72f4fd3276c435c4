"""Two plans side by side: what they do differently, and what each costs, estimated and compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..plans.record import ArrayPlan, Record, check_record
from .document import (
    Bar,
    Bars,
    Chapter,
    Column,
    Document,
    Entry,
    Figure,
    List,
    Segment,
    Table,
    Tone,
    size_text,
    spec_in_words,
    time_text,
    worth_a_line,
)
from .html import fragment
from .plan import layout_of
from .proof import SUMS, by_kind, compiler_of
from .terminal import Printed, plain_text

if TYPE_CHECKING:
    from rich.console import RenderableType

#: A figure of both plans; None where one does not know it or has no such thing.
Both = tuple[Any, Any]

# Choices that are one value each; those of pipeline stages count where there are stages.
_VALUES = ("remat", "microbatches", "accumulation", "schedule", "interleave", "stage_remat", "trainable")
_EXAMPLES = 3
# As many rows of one table (parameters, dimensions, …) as say more than their number does.
_CHOICES, _FINDINGS = 12, 8
# Differences below this part of a figure are none.
_ALIKE = 5e-4
_HEAD = ("A", "B", "B - A", "B / A")
# Colours of the plans' bars.
_LEGEND = {"before": "A", "compute": "B"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What both plans cost in one view of them: seconds of a step, bytes of a device, and their items."""

    step_seconds: Both
    peak_bytes: Both
    time: Mapping[str, Both]
    memory: Mapping[str, Both]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two plans, side by side; a terminal and a notebook show it.

    Attributes:
      names: what the plans are called.
      layouts: each plan's layout in words.
      unlike: sentences on what else than their layouts differs: program, topology, compiler.
      differs: ``mesh``, ``dims``, ``params``, … → name → what each has; what is alike is left out.
      estimated: costs by their Estimates, where one has any.
      compiled: costs by their proofs, where one has any.
      collectives: kind/axes → ``count``, ``bytes``, ``seconds``, ``exposed_seconds`` of each, where one has a
        proof.
      findings: of each plan's proof, what the compiler did that nobody planned.
    """

    names: tuple[str, str]
    layouts: tuple[str, str]
    unlike: tuple[str, ...]
    differs: Mapping[str, Mapping[str, Both]]
    estimated: Costs | None
    compiled: Costs | None
    collectives: Mapping[str, Mapping[str, Both]]
    findings: tuple[tuple[str, ...], tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain values; None is what a plan does not know."""
        return dataclasses.asdict(self)

    def __rich__(self) -> RenderableType:
        """Show the comparison in a terminal."""
        return Printed(comparison_document(self))

    def __repr__(self) -> str:
        """Write what a terminal of 80 columns shows."""
        return plain_text(comparison_document(self))

    def _repr_html_(self) -> str:
        """Show the comparison in a notebook."""
        return fragment(comparison_document(self))


def compare(first: Record, second: Record, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Return `first` and `second` side by side; plans for other programs or topologies are said to be so."""
    for name, plan in zip(names, (first, second), strict=True):
        check_record(name, plan)
    return Comparison(
        names=names,
        layouts=(layout_of(first), layout_of(second)),
        unlike=tuple(_unlike(first, second)),
        differs=_differs(first, second),
        estimated=_costs(first.estimate, second.estimate),
        compiled=_costs(first.proof, second.proof),
        collectives=_collectives(first, second),
        findings=(_findings(first), _findings(second)),
    )


def comparison_document(shown: Comparison) -> Document:
    """Return what a comparison shows in a terminal, in a notebook and as a page."""
    sides = zip("AB", shown.names, shown.layouts, strict=True)
    figures = tuple(
        Figure(name=letter, value=layout)
        if name == letter
        else Figure(name=letter, value=name, detail=layout)
        for letter, name, layout in sides
    )
    chapters = [_choices(shown)]
    for title, costs in (("estimated", shown.estimated), ("compiled", shown.compiled)):
        if costs is not None:
            chapters.append(Chapter(title=title, blocks=(_cost_bars(costs),)))
    if shown.collectives:
        chapters.append(_collective_bars(shown.collectives))
    for letter, mine, others in zip("AB", shown.findings, reversed(shown.findings), strict=True):
        if alone := tuple(what for what in mine if what not in others):
            chapters.append(
                Chapter(title=f"found in {letter} alone", blocks=(List(items=alone, most=_FINDINGS),))
            )
    return Document(
        name="Two plans", title="Two plans", figures=figures, warnings=shown.unlike, chapters=tuple(chapters)
    )


def _choices(shown: Comparison) -> Chapter:
    entries = []
    for table, rows in shown.differs.items():
        # An axis that a mesh lacks has size 1, a dimension that no axis shards is whole.
        absent = {"mesh": "1", "dims": "whole"}.get(table, "-")
        for name, both in rows.items():
            label = name if table == "values" else f"{table.replace('_', ' ')} {name}"
            entries.append(Entry(cells=(label, *(_choice(one, absent) for one in both)), group=table))
    if not entries:
        return Chapter(title="they choose alike", blocks=())
    columns = (Column(), Column(name="A"), Column(name="B"))
    block = Table(columns=columns, entries=tuple(entries), most=_CHOICES)
    return Chapter(title="what they do differently", blocks=(block,))


def _choice(value: Any, absent: str) -> str:
    """Write a choice: a spec as ``[fsdp, -]``, a table as ``name=value``, nothing as `absent`."""
    if value is None:
        return absent
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={one}" for name, one in value.items()) or absent
    return spec_in_words(value) if isinstance(value, list) else str(value)


def _cost_bars(costs: Costs) -> Bars:
    bars = []
    for name, whole, items, write in (
        ("step", costs.step_seconds, costs.time, time_text),
        ("memory", costs.peak_bytes, costs.memory, size_text),
    ):
        most = max(size or 0.0 for size in whole)
        bars.append(_bar(name, whole, write, most, tone="strong"))
        bars += [_bar(item, pair, write, most, depth=1) for item, pair in worth_a_line(items, most)]
    return Bars(bars=tuple(bars), head=_HEAD, legend=_LEGEND)


def _collective_bars(collectives: Mapping[str, Mapping[str, Both]]) -> Chapter:
    seconds = {name: max(size or 0.0 for size in sums["seconds"]) for name, sums in collectives.items()}
    most = max(seconds.values())
    bars = []
    for name in sorted(collectives, key=lambda name: -seconds[name]):
        sums = collectives[name]
        bars += [
            _bar(name, sums["seconds"], time_text, most),
            _bar("exposed", sums["exposed_seconds"], time_text, most, depth=1, tone="soft"),
            _bar("bytes", sums["bytes"], size_text, depth=1, tone="soft"),
            _bar("times", sums["count"], "{:,.0f}".format, depth=1, tone="soft"),
        ]
    block = Bars(bars=tuple(bars), head=_HEAD, legend=_LEGEND)
    return Chapter(title="collectives as compiled, of one device in a step", blocks=(block,))


def _bar(
    name: str,
    pair: Sequence[float | None],
    write: Callable[[float], str],
    most: float = 0.0,
    *,
    depth: int = 0,
    tone: Tone = "",
) -> Bar:
    """Return both figures, and bars of which `most` is as long as there is place; without it none."""
    one, other = pair
    tracks = tuple(
        (Segment(part=min(size / most, 1.0), kind=kind),) if size else ()
        for size, kind in zip(pair, _LEGEND, strict=True)
        if most
    )
    return Bar(name=name, figures=pair_texts((one, other), write), tracks=tracks, depth=depth, tone=tone)


def pair_texts(pair: Both, write: Callable[[float], str]) -> tuple[str, str, str, str]:
    """Return both figures, their difference and their ratio in words; ``-`` and nothing where one is missing.

    >>> pair_texts((2.0, 3.0), "{:g} s".format)
    ('2 s', '3 s', '+1 s', '1.50')
    """
    one, other = pair
    first, second = ("-" if size is None else write(size) for size in pair)
    if one is None or other is None:
        return first, second, "", ""
    # Figures as alike as this are written alike, and differ by rounding.
    if abs(other - one) <= _ALIKE * max(one, other):
        return first, second, "same", "1.00" if one else ""
    more = ("+" if other > one else "-") + write(abs(other - one))
    ratio = other / one if one else 0.0
    # Two digits that say something, whatever the ratio.
    written = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"
    return first, second, more, written if one else ""


def _unlike(first: Record, second: Record) -> list[str]:
    found = []
    if (program := _programs(first, second)) is not None:
        found.append(f"they are for different programs: {program}")
    if first.topology != second.topology:
        devices = [math.prod(plan.mesh.values()) for plan in (first, second)]
        found.append(
            f"they are for different topologies: {first.topology} and {second.topology}"
            + ("" if devices[0] == devices[1] else f", {devices[0]:,} and {devices[1]:,} devices")
        )
    if first.proof is not None and second.proof is not None:
        compilers = [compiler_of(plan.proof.versions) for plan in (first, second) if plan.proof is not None]
        if compilers[0] != compilers[1]:
            found.append(f"they were compiled by different compilers: {' and '.join(compilers)}")
    return found


def _programs(first: Record, second: Record) -> str | None:
    """Return what tells the plans' programs apart; None where nothing does."""
    for kind in ("params", "batch"):
        one, other = ({p: _shape(row) for p, row in getattr(plan, kind).items()} for plan in (first, second))
        if one != other:
            paths = [path for path in {**one, **other} if one.get(path) != other.get(path)]
            told = [
                f"{p} is {one.get(p, 'missing')} and {other.get(p, 'missing')}" for p in paths[:_EXAMPLES]
            ]
            more = f", and {len(paths) - _EXAMPLES} more" if len(paths) > _EXAMPLES else ""
            return "; ".join(told) + more
    mine, theirs = first.origin, second.origin
    # Versions of JAX trace a function differently, so that programs are compared under the same one only.
    if mine is None or theirs is None or mine.jax != theirs.jax or mine.fingerprint == theirs.fingerprint:
        return None
    names = {**mine.primitives, **theirs.primitives}
    counts = [(name, mine.primitives.get(name, 0), theirs.primitives.get(name, 0)) for name in names]
    told = [f"{name} {one} and {other} times" for name, one, other in counts if one != other]
    return "; ".join(told[:_EXAMPLES]) or "the same operations on other constants, shapes or orders"


def _shape(row: ArrayPlan) -> str:
    return f"{row.dtype}[{', '.join(map(str, row.shape))}]"


def _differs(first: Record, second: Record) -> dict[str, dict[str, Both]]:
    tables = {
        "mesh": ({axis: size for axis, size in plan.mesh.items() if size > 1} for plan in (first, second)),
        "dims": ({n: list(dim.axes) for n, dim in plan.dims.items() if dim.axes} for plan in (first, second)),
        "params": ({p: _spec(row) for p, row in plan.params.items()} for plan in (first, second)),
        "moments": (
            {p: _spec(dataclasses.replace(plan.params[p], spec=spec)) for p, spec in plan.moments.items()}
            for plan in (first, second)
        ),
        "batch": ({p: _spec(row) for p, row in plan.batch.items()} for plan in (first, second)),
        "state": ({p: _spec(row) for p, row in (plan.state or {}).items()} for plan in (first, second)),
        "values": ({name: getattr(plan, name) for name in _VALUES} for plan in (first, second)),
        "saved": (dict(plan.saved) for plan in (first, second)),
        "kernels": (dict(plan.kernels) for plan in (first, second)),
        "compiler_options": (dict(plan.compiler_options) for plan in (first, second)),
    }
    found = {name: _unequal(*pair) for name, pair in tables.items()}
    return {name: rows for name, rows in found.items() if rows}


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Both]:
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


def _spec(row: ArrayPlan) -> list[Any]:
    return [*row.spec, *(None,) * (len(row.shape) - len(row.spec))]


def _costs(one: Any, other: Any) -> Costs | None:
    """Return both sides' costs; `one` and `other` are Estimates or Proofs, or None."""
    if one is None and other is None:
        return None

    def both(name: str) -> Both:
        return (getattr(one, name, None), getattr(other, name, None))

    def items(name: str) -> dict[str, Both]:
        tables = both(name)
        return {
            key: (_item(tables[0], key), _item(tables[1], key))
            for key in {**(tables[0] or {}), **(tables[1] or {})}
        }

    return Costs(
        step_seconds=both("step_seconds"),
        peak_bytes=both("peak_bytes"),
        time=items("time"),
        memory=items("memory"),
    )


def _item(table: Mapping[str, float] | None, key: str) -> float | None:
    """Return an item of costs that are known: nothing of it is 0."""
    return None if table is None else table.get(key, 0.0)


def _collectives(first: Record, second: Record) -> dict[str, dict[str, Both]]:
    sides = [None if plan.proof is None else by_kind(plan.proof.collectives) for plan in (first, second)]
    nothing: dict[str, float] = dict.fromkeys(SUMS, 0.0)

    def both(key: str, name: str) -> Both:
        one, other = (None if side is None else side.get(key, nothing)[name] for side in sides)
        return one, other

    keys = dict.fromkeys(key for side in sides for key in side or {})
    return {key: {name: both(key, name) for name in SUMS} for key in keys}


def _findings(plan: Record) -> tuple[str, ...]:
    return () if plan.proof is None else tuple(row.what for row in plan.proof.findings)
