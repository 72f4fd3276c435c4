"""Which memory-bound equations run as one kernel, and what such a kernel reads and writes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from ..program.flops import matmul_roles
from ..program.primitives import Trait, primitives
from .tables import Flat, FlatOp

_NEVER_FUSED = frozenset({"index", "window", "group", "whole"})
_LINEAR = primitives(Trait.LINEAR)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Kernels of memory-bound work, G: section, runs, recomputed anyway, touching attention scores.

    of_equation [E] is the kernel that an equation is part of, or -1.
    Edges say which value crosses the border of a group, with the times it is moved forward and backward.
    """

    section: np.ndarray
    runs: np.ndarray
    rematted: np.ndarray
    core: np.ndarray
    of_equation: np.ndarray
    edge_group: np.ndarray
    edge_value: np.ndarray
    edge_forward: np.ndarray
    edge_backward: np.ndarray


def is_linear(flat: Flat, op: FlatOp) -> bool:
    """Whether the gradient of `op` needs none of the operands that gradients flow into."""
    name = op.equation.primitive
    if name in _LINEAR:
        return True
    grads = [flat.values[i].grad for i in op.ins]
    if name == "mul":
        return sum(grads) <= 1
    if name == "div":
        return len(grads) == 2 and not grads[1]
    return name == "select_n" or not any(grads)


def is_fusible(op: FlatOp) -> bool:
    """Whether a compiler runs `op` in one kernel with its neighbours: elementwise work, reductions."""
    if matmul_roles(op.equation) is not None:
        return False
    return _NEVER_FUSED.isdisjoint(factor.kind for factor in op.equation.factors)


def kernel_roots(flat: Flat) -> list[int]:
    """Return for each op the op that stands for its kernel; products stand for themselves."""
    parent = list(range(len(flat.ops)))
    depths = _depths(flat)

    def find(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for number, op in enumerate(flat.ops):
        if not is_fusible(op):
            continue
        for index in op.ins:
            producer = flat.values[index].producer
            if producer < 0:
                continue
            other = flat.ops[producer]
            # What a reduction gives is known only when its kernel ends, unless a row fits on the chip: then
            # the numbers that it read are still there, which is how norms and softmax are run.
            alike = is_fusible(other) and other.runs == op.runs and other.section == op.section
            if alike and depths[producer] == depths[number] and other.call == op.call:
                parent[find(number)] = find(producer)
    return [find(n) for n in range(len(flat.ops))]


def _depths(flat: Flat) -> list[int]:
    """Return for each op how many kernels of their own, one after another, come before it.

    A kernel of ops at several depths would wait for what it feeds: a residual stream that is normalised
    for a product and added to the product's result is read again for the sum.
    """
    found: list[int] = []
    for op in flat.ops:
        depth = 0
        for index in op.ins:
            producer = flat.values[index].producer
            if 0 <= producer < len(found):
                depth = max(depth, found[producer] + (not is_fusible(flat.ops[producer])))
        found.append(depth)
    return found


def fuse(flat: Flat) -> Groups:
    """Return the kernels of `flat` that are no matrix products."""
    roots = kernel_roots(flat)
    consumers: dict[int, set[int]] = defaultdict(set)
    for number, op in enumerate(flat.ops):
        for index in op.ins:
            consumers[index].add(roots[number])
    members: dict[int, list[int]] = defaultdict(list)
    for number, op in enumerate(flat.ops):
        if matmul_roles(op.equation) is None and op.runs:
            members[roots[number]].append(number)
    section, runs, rematted, core, edges = [], [], [], [], []
    of_equation = np.full(len(flat.ops), -1)
    for root, group in members.items():
        found = _edges(flat, root, group, consumers)
        if not found:
            continue
        first = flat.ops[group[0]]
        edges += [(len(section), *edge) for edge in found]
        of_equation[group] = len(section)
        section.append(first.section)
        runs.append(first.runs)
        rematted.append(first.rematted)
        touched = [i for n in group for i in (*flat.ops[n].ins, *flat.ops[n].outs)]
        core.append(first.call >= 0 or any(flat.values[i].core for i in touched))
    table = np.array(edges, float).reshape(-1, 4)
    return Groups(
        section=np.array(section, int),
        runs=np.array(runs, float),
        rematted=np.array(rematted, bool),
        core=np.array(core, bool),
        of_equation=of_equation,
        edge_group=table[:, 0].astype(int),
        edge_value=table[:, 1].astype(int),
        edge_forward=table[:, 2],
        edge_backward=table[:, 3],
    )


def _edges(
    flat: Flat, root: int, group: list[int], consumers: dict[int, set[int]]
) -> list[tuple[int, float, float]]:
    """Return (value, times moved forward, times moved backward) of one kernel.

    Forward, what comes in is read and what others read is written. Backward, the gradient of what went out is
    read and that of what came in is written; unless the kernel is linear, what came in is read once more.
    """
    made = {i for n in group for i in flat.ops[n].outs}
    linear = all(is_linear(flat, flat.ops[n]) for n in group)
    looks_up = any(factor.kind == "index" for n in group for factor in flat.ops[n].equation.factors)
    edges: dict[int, tuple[float, float]] = {}
    for number in group:
        op = flat.ops[number]
        for place, index in enumerate(op.ins):
            value = flat.values[index]
            # Looking rows up does not read the table, only as many rows as it gives.
            if index in made or value.elements <= 1 or (looks_up and place == 0):
                continue
            edges[index] = (
                1.0,
                float(value.grad) + float(not linear and any(flat.values[i].grad for i in made)),
            )
        for index in op.outs:
            value = flat.values[index]
            outside = consumers[index] - {root}
            if value.elements > 1 and (outside or not consumers[index]):
                edges[index] = (1.0, float(value.grad))
    return [(index, *times) for index, times in edges.items()]
