"""An order to run a program in whose repeats run as one: what a scan needs comes before it, its users behind.

Nodes are numbers: n >= 0 is equation n of the graph, ~r is repeat r.
"""

from __future__ import annotations

import heapq
from typing import Any

from .graph import Graph
from .keys import Written
from .wiring import Repeat


def order(graph: Graph, repeats: list[Repeat]) -> list[int] | None:
    """Return an order to run the program in: equations, and ~n for repeat n; None if there is none.

    It is the order traced as far as repeats, which stand where their first equation stood, allow it.
    """
    needs = _needs(graph, repeats)
    wanted, left = set[int](), list(_roots(graph))
    while left:
        node = left.pop()
        if node not in wanted:
            wanted.add(node)
            left += needs[node]
    if any(node in needs[node] for node in wanted):
        return None
    rank = {node: node if node >= 0 else min(n for c in repeats[~node].copies for n in c) for node in wanted}
    missing = {node: len(needs[node]) for node in wanted}
    users: dict[int, list[int]] = {}
    for node in wanted:
        for one in needs[node]:
            users.setdefault(one, []).append(node)
    ready = [(rank[node], node) for node in wanted if not missing[node]]
    heapq.heapify(ready)
    found = []
    while ready:
        _, node = heapq.heappop(ready)
        found.append(node)
        for user in users.get(node, ()):
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, (rank[user], user))
    return found if len(found) == len(wanted) else None


def _roots(graph: Graph) -> set[int]:
    roots = {_node(graph, value) for value in graph.results}
    roots |= {_runner(graph, n) for n, eqn in enumerate(graph.eqns) if eqn.eqn.effects}
    return {node for node in roots if node is not None}


def _runner(graph: Graph, n: int) -> int:
    """Return what runs equation `n`: itself, or ~r for repeat r."""
    return ~graph.owner[n] if n in graph.owner else n


def _node(graph: Graph, atom: Any) -> int | None:
    n = graph.maker(atom)
    return None if n < 0 else _runner(graph, n)


def _needs(graph: Graph, repeats: list[Repeat]) -> dict[int, set[int]]:
    needs: dict[int, set[int]] = {}
    for r, made in enumerate(repeats):
        atoms = [atom for row in made.rows for atom in row] + [first for _, first in made.carries]
        atoms += [atom for sources in made.sources for kind, atom in sources if kind == "shared"]
        needs[~r] = {node for atom in atoms if (node := _node(graph, atom)) is not None}
    for n, eqn in enumerate(graph.eqns):
        if n not in graph.owner:
            needs[n] = {
                node
                for atom in eqn.ins
                if not isinstance(atom, Written) and (node := _node(graph, atom)) is not None
            }
    return needs
