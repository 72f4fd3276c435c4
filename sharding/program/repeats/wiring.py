"""How copies of a group of equations hang together: what is handed on, what is shared, what differs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..primitives import Trait, primitives
from .graph import Atom, Graph
from .keys import Written

# Which equation of a copy, and which of its results.
Place = tuple[int, int]
# Where an operand comes from: ("in", place) of its own copy, ("carry", number) from the copy before,
# ("shared", atom) from outside, alike for all, or ("row", number) from outside, another one for each.
Source = tuple[str, Any]

_READS = primitives(Trait.PICKING) | {"slice"}
# Literals that come again after more copies than that differ for another reason.
_LONGEST_CYCLE = 12


@dataclasses.dataclass(kw_only=True, eq=False)
class Repeat:
    """Copies of one group of equations, wired alike.

    copies: for each copy its equations, those of the spine first; `spine` is how many these are.
    sources: for each equation of a copy, where its operands come from, then the literals inside of it.
    carries: the place of what a copy hands on, and the first copy's in its stead.
    rows: what comes from outside and differs, an atom for each copy.
    read: the places that others read, and of which copies.
    """

    copies: list[list[int]]
    spine: int
    sources: list[list[Source]]
    carries: list[tuple[Place, Atom]]
    rows: list[list[Atom]]
    read: dict[Place, tuple[int, ...]]

    def values(self, graph: Graph, copy: int) -> dict[int, Place]:
        """Return the values that a copy gives, and their places."""
        return _places(graph, self.copies[copy])

    def is_chain(self) -> bool:
        """Whether what a copy hands on depends on what it was handed; else copies stand side by side."""
        handed = self._handed()
        return any(handed[j] for (j, _), _ in self.carries)

    def is_of_layers(self, graph: Graph) -> bool:
        """Whether copies have parameters of their own, or one layer works on what it gave the time before."""
        rows = [row[0] for row in self.rows]
        if any(not isinstance(atom, Written) and graph.is_param[atom] for atom in rows):
            return True
        handed = self._handed()
        return any(
            handed[j] and graph.eqns[n].works and self._reads_parameter(graph, j)
            for j, n in enumerate(self.copies[0])
        )

    def _handed(self) -> list[bool]:
        """Return for each equation of a copy whether it depends on what the copy was handed."""
        depends: dict[int, bool] = {}

        def reached(j: int) -> bool:
            if j not in depends:
                depends[j] = False
                depends[j] = any(
                    kind == "carry" or (kind == "in" and reached(where[0])) for kind, where in self.sources[j]
                )
            return depends[j]

        return [reached(j) for j in range(len(self.sources))]

    def _reads_parameter(self, graph: Graph, j: int) -> bool:
        """Whether an operand of equation `j` comes of parameters alone, which are the same in all copies."""
        first = self.copies[0]
        for kind, where in self.sources[j]:
            if kind == "in":
                place, result = where
                if graph.is_param[graph.eqns[first[place]].outs[result]]:
                    return True
            elif kind == "shared" and not isinstance(where, Written) and graph.is_param[where]:
                return True
        return False


def _places(graph: Graph, copy: Sequence[int]) -> dict[int, Place]:
    return {value: (j, k) for j, n in enumerate(copy) for k, value in enumerate(graph.eqns[n].outs)}


def wire(graph: Graph, copies: list[list[int]], spine: int) -> Repeat | None:
    """Say where every operand of every copy comes from; None if the copies are not alike."""
    return _Wiring(graph, copies, spine).done()


class _Wiring:
    def __init__(self, graph: Graph, copies: list[list[int]], spine: int) -> None:
        self._graph, self._copies = graph, copies
        self._places = [_places(graph, copy) for copy in copies]
        self._carries: dict[Any, int] = {}
        self._rows: dict[Any, int] = {}
        self._made = Repeat(copies=copies, spine=spine, sources=[], carries=[], rows=[], read={})

    def done(self) -> Repeat | None:
        eqns, copies, made = self._graph.eqns, self._copies, self._made
        for j in range(len(copies[0])):
            equations = [eqns[copy[j]] for copy in copies]
            sources: list[Source] = []
            for k in range(len(equations[0].ins)):
                source = self._source([one.ins[k] for one in equations])
                if source is None:
                    return None
                sources.append(source)
            sources += [
                self._row([one.literals[n] for one in equations]) for n in range(len(equations[0].literals))
            ]
            made.sources.append(sources)
        self._read()
        return made

    def _source(self, atoms: list[Atom]) -> Source | None:
        own = [self._place(r, atom) for r, atom in enumerate(atoms)]
        if any(place is not None for place in own):
            return ("in", own[0]) if len(set(own)) == 1 else None
        before = [self._place(r, atom) for r, atom in enumerate(atoms[1:])]
        if not any(place is not None for place in before):
            return self._row(atoms)
        if len(set(before)) > 1 or before[0] is None:
            return None
        name = before[0], name_of(atoms[0])
        if name not in self._carries:
            self._carries[name] = len(self._made.carries)
            self._made.carries.append((before[0], atoms[0]))
        return "carry", self._carries[name]

    def _place(self, copy: int, atom: Atom) -> Place | None:
        return None if isinstance(atom, Written) else self._places[copy].get(atom)

    def _row(self, atoms: Sequence[Atom]) -> Source:
        names = tuple([name_of(atom) for atom in atoms])
        if len(set(names)) == 1:
            return "shared", atoms[0]
        if names not in self._rows:
            self._rows[names] = len(self._made.rows)
            self._made.rows.append(list(atoms))
        return "row", self._rows[names]

    def _read(self) -> None:
        """Find what is read outside of a copy and the next one."""
        graph, copies = self._graph, self._copies
        inside = [set(copy) for copy in copies]
        read: dict[Place, list[int]] = {}
        for r, places in enumerate(self._places):
            near = inside[r] | inside[r + 1] if r + 1 < len(copies) else inside[r]
            for value, place in places.items():
                if value in graph.results or any(user not in near for user in graph.users[value]):
                    read.setdefault(place, []).append(r)
        self._made.read = {place: tuple(found) for place, found in read.items()}


def name_of(atom: Atom) -> Any:
    """Return what is equal for equal atoms."""
    return atom.name if isinstance(atom, Written) else atom


def absorb(graph: Graph, copies: list[list[int]]) -> None:
    """Take into each copy what stands outside and is computed for it only, alike for all."""
    eqns = graph.eqns
    inside = [set(copy) for copy in copies]
    done, waiting, progress = 0, [], True
    while progress:
        progress = False
        for j in range(done, len(copies[0])):
            waiting += [(j, k) for k in range(len(eqns[copies[0][j]].ins))]
        done = len(copies[0])
        left = []
        for place in waiting:
            makers = [graph.maker(eqns[copy[place[0]]].ins[place[1]]) for copy in copies]
            if not _alike(graph, makers, inside):
                continue
            if all(_serves_only(graph, n, inside[r]) for r, n in enumerate(makers)):
                for copy, own, n in zip(copies, inside, makers, strict=True):
                    copy.append(n)
                    own.add(n)
                progress = True
            else:
                left.append(place)
        waiting = left


def _alike(graph: Graph, makers: Sequence[int], inside: Sequence[set[int]]) -> bool:
    """Whether operands are given by equations outside, one for each copy, that do the same."""
    eqns = graph.eqns
    if any(n < 0 for n in makers) or len(set(makers)) < len(makers):
        return False
    first = eqns[makers[0]]
    if any(
        n in graph.position or n in graph.owner or eqns[n].key != first.key or eqns[n].eqn.effects
        for n in makers
    ):
        return False
    if any(n in own for n in makers for own in inside):
        return False
    # Rows read of one array: its gradient would be all of it, in every turn.
    return not _reads_one_array(graph, makers)


def _reads_one_array(graph: Graph, makers: Sequence[int]) -> bool:
    """Whether equations read of one array, or take the dimension of 1 away of what others read of it."""
    eqns = graph.eqns
    if eqns[makers[0]].name == "squeeze":
        makers = [graph.maker(eqns[n].ins[0]) for n in makers]
        if any(n < 0 for n in makers):
            return False
    if any(eqns[n].name not in _READS or isinstance(eqns[n].ins[0], Written) for n in makers):
        return False
    return len({name_of(eqns[n].ins[0]) for n in makers}) == 1


def _serves_only(graph: Graph, n: int, copy: set[int]) -> bool:
    return all(
        value not in graph.results and all(user in copy for user in graph.users[value])
        for value in graph.eqns[n].outs
    )


def cycle_of(graph: Graph, repeat: Repeat) -> int:
    """Return after how many copies the literals, or the masks, that differ come again; 1 if they do not.

    Where layers run several times in a row, that many copies are one.
    """
    whole, count = 1, len(repeat.copies)
    for row in repeat.rows:
        names = [graph.origin(atom) for atom in row]
        if any(not isinstance(atom, Written) and graph.depends_on_params[atom] for atom in row):
            whole = math.lcm(whole, _in_a_row(names))
            continue
        for length in range(1, min(count // 2, _LONGEST_CYCLE) + 1):
            if all(names[r] == names[r - length] for r in range(length, count)):
                whole = math.lcm(whole, length)
                break
    return whole if whole <= _LONGEST_CYCLE else 1


def _in_a_row(names: Sequence[Any]) -> int:
    """Return how often each of some names comes in a row, the same number of times each; 1 if it does not."""
    count = len(names)
    sizes = (n for n in range(min(count // 2, _LONGEST_CYCLE), 1, -1) if count % n == 0)
    return next((n for n in sizes if all(names[r] == names[r - r % n] for r in range(count))), 1)


def earlier(graph: Graph, repeat: Repeat) -> list[list[int]]:
    """Return copies before the first, in order, where others stand in between: equations of the spine."""
    found: list[list[int]] = []
    wanted = [(place, atom) for place, atom in repeat.carries]
    taken: set[int] = set()
    while (copy := _before(graph, repeat, wanted, taken)) is not None:
        taken.update(copy)
        found.insert(0, copy)
        wanted = [
            (repeat.carries[number][0], graph.eqns[n].ins[k])
            for n, sources in zip(copy, repeat.sources, strict=False)
            for k, (kind, number) in enumerate(sources[: len(graph.eqns[n].ins)])
            if kind == "carry"
        ]
    return found


def _before(
    graph: Graph, repeat: Repeat, wanted: Sequence[tuple[Place, Atom]], taken: set[int]
) -> list[int] | None:
    """Return the equations that give `wanted`, as the spine of a copy gives it; None if there are none."""
    eqns, template = graph.eqns, repeat.copies[0]
    found: dict[int, int] = {}
    todo = list(wanted)
    while todo:
        (j, k), atom = todo.pop()
        n = graph.maker(atom)
        if n < 0:
            return None
        if j >= repeat.spine:
            continue
        if j in found:
            if found[j] != n:
                return None
            continue
        if n in taken or not _stands_free(graph, n, template[j]) or graph.eqns[n].outs.index(atom) != k:
            return None
        found[j] = n
        rows = zip(repeat.sources[j][: len(eqns[n].ins)], eqns[n].ins, strict=True)
        todo += [(place, one) for (kind, place), one in rows if kind == "in"]
    if len(found) < repeat.spine or len(set(found.values())) < repeat.spine:
        return None
    return [found[j] for j in range(repeat.spine)]


def _stands_free(graph: Graph, n: int, like: int) -> bool:
    eqns = graph.eqns
    return (
        n in graph.position
        and n not in graph.owner
        and eqns[n].key == eqns[like].key
        and not eqns[n].eqn.effects
    )


def later(graph: Graph, repeat: Repeat) -> list[list[int]]:
    """Return copies after the last, in order, where others stand in between."""
    found: list[list[int]] = []
    last, taken = repeat.copies[-1], set[int]()
    while (copy := _after(graph, repeat, last, taken)) is not None:
        taken.update(copy)
        found.append(copy)
        last = copy
    return found


def _after(graph: Graph, repeat: Repeat, last: Sequence[int], taken: set[int]) -> list[int] | None:
    """Return the first equations that do with what `last` hands on as the spine of a copy does."""
    eqns, template = graph.eqns, repeat.copies[0]
    found: dict[int, int] = {}
    # In the order traced: of several that do the same with the same, the first comes first.
    for j in sorted(range(repeat.spine), key=lambda j: template[j]):
        known: dict[int, Atom] = {}
        for k, (kind, where) in enumerate(repeat.sources[j][: len(eqns[template[j]].ins)]):
            place = where if kind == "in" else repeat.carries[where][0] if kind == "carry" else None
            if place is None or place[0] >= repeat.spine:
                continue
            if kind == "in" and place[0] not in found:
                return None
            maker = found[place[0]] if kind == "in" else last[place[0]]
            known[k] = eqns[maker].outs[place[1]]
        if not known:
            return None
        users = graph.users[next(iter(known.values()))]  # type: ignore[index]
        n = next(
            (
                n
                for n in users
                if n not in taken
                and n not in found.values()
                and _stands_free(graph, n, template[j])
                and all(eqns[n].ins[k] == atom for k, atom in known.items())
            ),
            None,
        )
        if n is None:
            return None
        found[j] = n
    return [found[j] for j in range(repeat.spine)]
