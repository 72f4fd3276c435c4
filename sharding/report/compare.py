"""Two plans side by side, as data: what they do differently, and what each costs, estimated and compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..words import layout_in_words
from .compiled_view import compiler_of, over

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..plans.record import ArrayPlan, Record

#: A figure of both plans; None where one does not know it or has no such thing.
Both = tuple[Any, Any]

# Choices that are one value each; those of pipeline stages count where there are stages.
_VALUES = ("remat", "microbatches", "schedule", "interleave")
_EXAMPLES = 3


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
        """Return the comparison as plain values."""
        return dataclasses.asdict(self)

    def __rich__(self) -> RenderableType:
        """Show the comparison in a terminal."""
        from .compare_table import comparison_table

        return comparison_table(self)

    def __repr__(self) -> str:
        """Write what a terminal of 80 columns shows."""
        from rich.console import Console

        console = Console(width=80, color_system=None)
        with console.capture() as written:
            console.print(self)
        return "\n".join(line.rstrip() for line in written.get().splitlines())

    def _repr_html_(self) -> str:
        """Show the comparison in a notebook."""
        from .compare_page import comparison_fragment

        return comparison_fragment(self)


def compare(first: Record, second: Record, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Return `first` and `second` side by side; plans for other programs or topologies are said to be so."""
    return Comparison(
        names=names,
        layouts=(_layout(first), _layout(second)),
        unlike=tuple(_unlike(first, second)),
        differs=_differs(first, second),
        estimated=_costs(first.estimate, second.estimate),
        compiled=_costs(first.proof, second.proof),
        collectives=_collectives(first, second),
        findings=(_findings(first), _findings(second)),
    )


def compare_table(first: Record, second: Record, names: tuple[str, str] = ("A", "B")) -> RenderableType:
    """Return a renderable of rich that shows two plans side by side in 80 columns."""
    return compare(first, second, names).__rich__()


def compare_dict(first: Record, second: Record, names: tuple[str, str] = ("A", "B")) -> dict[str, Any]:
    """Return two plans side by side as plain values, see `Comparison`; None is what a plan does not know."""
    return compare(first, second, names).to_dict()


def _layout(plan: Record) -> str:
    return f"{plan.topology}: {layout_in_words(plan.mesh, plan.remat, plan.microbatches, plan.saved)}"


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
    sides: list[dict[str, dict[str, float]] | None] = []
    for plan in (first, second):
        if plan.proof is None:
            sides.append(None)
            continue
        found: dict[str, dict[str, float]] = {}
        for row in plan.proof.collectives:
            sums = found.setdefault(f"{row.kind}/{over(row.axes)}", dict.fromkeys(_SUMS, 0.0))
            for name in _SUMS:
                sums[name] += getattr(row, name)
        sides.append(found)
    keys = {key: None for side in sides for key in side or {}}
    return {
        key: {
            name: (
                None if sides[0] is None else sides[0].get(key, {}).get(name, 0.0),
                None if sides[1] is None else sides[1].get(key, {}).get(name, 0.0),
            )
            for name in _SUMS
        }
        for key in keys
    }


_SUMS = ("count", "bytes", "seconds", "exposed_seconds")


def _findings(plan: Record) -> tuple[str, ...]:
    return () if plan.proof is None else tuple(row.what for row in plan.proof.findings)
