"""A traced program with its repeated layers run as scans."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ..jaxpr import Traced, call_body, context_of, is_extended, run, run_around, scan_parts, with_inputs
from ..primitives import Trait, primitives
from .find import Finder
from .flat import FlatEquation, flatten
from .graph import Graph
from .inside import cast_within, run_given
from .keys import Keys, Written
from .notes import notes_of
from .order import order
from .rows import Evaluation
from .wiring import Place, Repeat, Source

_CHECKPOINTS = primitives(Trait.CHECKPOINT)


def rolled(traced: Traced) -> Traced:
    """Return `traced` with layers that are written out one after another as scans over stacked parameters.

    The same arguments, results and values. A program without such layers is returned as it is.
    """
    params = len(jax.tree.leaves(traced.args[0])) if traced.args else 0
    count = len(traced.jaxpr.in_avals)
    is_param = [n < params for n in range(count)]
    found = search(traced.jaxpr, is_param, [not one for one in is_param], Keys())
    if found.notes:
        traced = dataclasses.replace(traced, notes=(*traced.notes, *found.notes))
    if not (found.repeats or found.inner):
        return traced
    shapes = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))
        for aval in traced.jaxpr.in_avals
    ]
    made = jax.make_jaxpr(lambda *args: found.run(args))(*shapes)
    return dataclasses.replace(traced, jaxpr=core.ClosedJaxpr(_without_unread(made.jaxpr), made.consts))


def _without_unread(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """Return a program without what nothing reads: rows of an array that a scan walks as it is."""
    live: set[Any] = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not live.isdisjoint(eqn.outvars):
            live.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
            kept.append(eqn)
    return with_inputs(
        jaxpr, constvars=jaxpr.constvars, invars=jaxpr.invars, eqns=kept[::-1], outvars=jaxpr.outvars
    )


def search(
    program: core.ClosedJaxpr, is_param: Sequence[bool], is_data: Sequence[bool], keys: Keys
) -> Rolling:
    """Return how `program` is run with its repeats as scans, those in its loops too."""
    graph = Graph(flatten(program, keys), is_param, is_data)
    repeats = Finder(graph).find()
    inner = {}
    for n, one in enumerate(graph.eqns):
        if n in graph.owner or not one.works:
            continue
        found = _search_inside(graph, one, keys)
        if found is not None and (found.repeats or found.inner):
            inner[n] = found
    notes = [*notes_of(graph, repeats), *(note for one in inner.values() for note in one.notes)]
    return Rolling(graph=graph, repeats=repeats, inner=inner, notes=tuple(notes))


def _search_inside(graph: Graph, one: FlatEquation, keys: Keys) -> Rolling | None:
    """Look for repeats in a checkpoint, a manual region, or a loop that is no loop over layers itself."""
    body = call_body(one.eqn)
    if one.name not in (*_CHECKPOINTS, "shard_map", "scan") or body is None:
        return None
    given = [not isinstance(atom, Written) and atom for atom in one.ins]
    is_param = [atom is not False and graph.depends_on_params[atom] for atom in given]
    is_data = [atom is not False and graph.depends_on_data[atom] for atom in given]
    if one.name == "scan":
        parts = scan_parts(one.eqn)
        first_xs = parts.num_consts + parts.num_carry
        if any(p and not d for p, d in zip(is_param[first_xs:], is_data[first_xs:], strict=True)):
            return None
        for n in range(parts.num_consts, first_xs):
            is_param[n], is_data[n] = any(is_param), any(is_data)
    return search(body, is_param, is_data, keys)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rolling:
    """A program with its repeats; `inner` are those of programs that its equations run.

    `notes` say what was found, and what nearly.
    """

    graph: Graph
    repeats: list[Repeat]
    inner: dict[int, Rolling]
    notes: tuple[str, ...]

    def run(self, args: Sequence[Any]) -> list[Any]:
        """Run the program, its repeats as scans."""
        return _Run(self, args).outputs()


class _Run:
    """One run of a program: `rows` holds its values."""

    def __init__(self, rolling: Rolling, args: Sequence[Any]) -> None:
        self._graph, self._rolling = rolling.graph, rolling
        self._rows = Evaluation(rolling.graph)
        self._rows.values.update(rolling.graph.flat.consts)
        self._rows.values.update(zip(rolling.graph.flat.ins, args, strict=True))

    def outputs(self) -> list[Any]:
        for node in order(self._graph, self._rolling.repeats) or ():
            if node < 0:
                self._scan(self._rolling.repeats[~node])
                continue
            one = self._graph.eqns[node]
            inputs = [self._rows.read(atom) for atom in one.ins]
            with context_of(one.eqn):
                inner = self._rolling.inner.get(node)
                outs = run(one.eqn, inputs) if inner is None else _around(one.eqn, inputs, inner)
            self._rows.values.update(zip(one.outs, outs, strict=True))
        return [self._rows.read(atom) for atom in self._graph.flat.outs]

    def _scan(self, made: Repeat) -> None:
        turns = _Turns(self._graph, made, self._rows)
        outcome = turns.run()
        for r in range(len(made.copies)):
            for value, place in made.values(self._graph, r).items():
                if r in made.read.get(place, ()):
                    outcome.give(self._rows, value, place, r)


def _around(eqn: core.JaxprEqn, inputs: Sequence[Any], inner: Rolling) -> Sequence[Any]:
    return run_around(eqn, list(inputs), inner.run)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Outcome:
    """What a scan gave: last carries, values of single copies, and values of all copies stacked."""

    carried: dict[Place, Any]
    single: dict[tuple[Place, int], Any]
    stacked: dict[Place, Any]

    def give(self, rows: Evaluation, value: int, place: Place, copy: int) -> None:
        if place in self.stacked:
            rows.rows_of[value] = self.stacked[place], copy
        elif (place, copy) in self.single:
            rows.values[value] = self.single[place, copy]
        else:
            rows.values[value] = self.carried[place]


class _Turns:
    """The scan of one repeat."""

    def __init__(self, graph: Graph, made: Repeat, rows: Evaluation) -> None:
        self._graph, self._made, self._rows = graph, made, rows
        self._template = [graph.eqns[n] for n in made.copies[-1]]
        self._order = sorted(range(len(self._template)), key=lambda j: made.copies[-1][j])
        self._casts = self._cast_before()
        self._stacked, self._single = self._leaving()

    def _aval(self, place: Place) -> Any:
        return self._graph.flat.avals[self._template[place[0]].outs[place[1]]]

    def _leaving(self) -> tuple[list[Place], list[tuple[Place, int]]]:
        """Divide what others read: of most copies stacked, of few carried from the turn that gives it."""
        carried = {place for place, _ in self._made.carries}
        last = len(self._made.copies) - 1
        every, single = [], []
        for place, copies in self._made.read.items():
            if copies == (last,) and place in carried:
                continue
            extended = is_extended(self._aval(place).dtype)
            if len(copies) > len(self._made.copies) // 2 or extended:
                every.append(place)
            else:
                single += [(place, copy) for copy in copies]
        return every, single

    def _cast_before(self) -> dict[int, Any]:
        """Return row → the smaller type that all of a copy reads it in: it is cast before it is stacked."""
        uses: dict[int, set[Any]] = {}
        for j, sources in enumerate(self._made.sources):
            one = self._template[j]
            for k, (kind, number) in enumerate(sources):
                if kind != "row":
                    continue
                found = None
                if one.name == "convert_element_type":
                    found = one.eqn.params["new_dtype"]
                elif one.name in _CHECKPOINTS and k < len(one.ins):
                    found = cast_within(call_body(one.eqn), k)
                uses.setdefault(number, set()).add(found)
        casts = {}
        for number, found in uses.items():
            atom, dtype = self._made.rows[number][0], next(iter(found))
            if len(found) == 1 and dtype is not None and not isinstance(atom, Written):
                own = self._graph.flat.avals[atom].dtype
                if jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize < own.itemsize:
                    casts[number] = dtype
        return casts

    def run(self) -> _Outcome:
        made, count = self._made, len(self._made.copies)
        first = [_like(self._rows.read(atom), self._aval(place)) for place, atom in made.carries]
        empty = [jnp.zeros(self._aval(place).shape, self._aval(place).dtype) for place, _ in self._single]
        xs = [self._rows.stack(row, self._casts.get(n)) for n, row in enumerate(made.rows)]
        counted = any(copy != count - 1 for _, copy in self._single)
        turn_numbers = jax.lax.iota("int32", count) if counted else None

        def turn(carry: Any, given: Any) -> Any:
            stream, kept = carry
            rows, number = given
            results = self._copy(stream, rows)
            new = [_like(results[place], self._aval(place)) for place, _ in made.carries]
            taken = [
                results[place] if copy == count - 1 else jnp.where(number == copy, results[place], old)
                for (place, copy), old in zip(self._single, kept, strict=True)
            ]
            return (new, taken), [results[place] for place in self._stacked]

        with context_of(self._template[self._order[0]].eqn):
            (stream, kept), every = jax.lax.scan(turn, (first, empty), (xs, turn_numbers), length=count)
        return _Outcome(
            carried={place: value for (place, _), value in zip(made.carries, stream, strict=True)},
            single=dict(zip(self._single, kept, strict=True)),
            stacked=dict(zip(self._stacked, every, strict=True)),
        )

    def _copy(self, stream: Sequence[Any], rows: Sequence[Any]) -> dict[Place, Any]:
        """Run one copy: what it is handed and its rows → its results by place."""
        results: dict[Place, Any] = {}

        def value(source: Source) -> Any:
            kind, which = source
            if kind == "in":
                return results[which]
            if kind == "shared":
                return self._rows.read(which)
            return stream[which] if kind == "carry" else rows[which]

        for j in self._order:
            one, sources = self._template[j], self._made.sources[j]
            inputs = [value(source) for source in sources[: len(one.ins)]]
            literals = [value(source) for source in sources[len(one.ins) :]]
            differs = any(kind == "row" for kind, _ in sources[len(one.ins) :])
            cast = any(kind == "row" and number in self._casts for kind, number in sources[: len(one.ins)])
            with context_of(one.eqn):
                if cast and one.name == "convert_element_type":
                    outs: Sequence[Any] = inputs
                elif cast or differs:
                    outs = run_given(one.eqn, literals, inputs)
                else:
                    outs = run(one.eqn, inputs)
            results.update({(j, k): out for k, out in enumerate(outs)})
        return results


def _like(value: Any, aval: Any) -> Any:
    """Return `value` as it is handed on: a first one may be a number, or weakly typed."""
    return value if getattr(value, "aval", None) == aval else jax.lax.convert_element_type(value, aval.dtype)
