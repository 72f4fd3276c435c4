"""Which arrays the backward pass keeps under each rematerialisation policy."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from ..program.flops import matmul_roles
from .flatten import LAYERS, Flat, Leaf
from .fusion import _roots, is_fusible, is_linear

# Primitives whose gradient is read off their result.
_BY_RESULT = frozenset(["exp", "tanh", "logistic", "rsqrt", "sqrt", "max", "exp2"])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Saved:
    """Masks over values: what is kept in layers under each policy, and outside of them always.

    on_chip: what never reaches memory when attention is one kernel.
    """

    by_policy: dict[str, np.ndarray]
    on_chip: np.ndarray


def residuals(flat: Flat) -> Saved:
    """Return what each policy keeps.

    ``none`` keeps what JAX's gradients of single operations read; ``none/fused`` what fused kernels with
    their own gradients read; ``dots`` the results of products without batch dims, and the carry; ``full``
    the carry.
    """
    count = len(flat.values)
    carry = np.zeros(count, bool)
    carry[list(flat.carries)] = True
    masks = {"none": carry.copy(), "none/fused": carry.copy(), "dots": carry.copy(), "full": carry.copy()}
    for leaf in flat.leaves:
        if leaf.rematted:
            continue
        for index in _residuals_of(flat, leaf):
            masks["none"][index] = True
            if leaf.section != LAYERS:
                masks["dots"][index] = masks["full"][index] = True
        roles = matmul_roles(leaf.equation)
        if roles is not None and not roles.batch and leaf.section == LAYERS:
            masks["dots"][list(leaf.outs)] = True
    for index in _read_by_kernels(flat):
        masks["none/fused"][index] = True
    kept = np.array([_is_kept(flat, n) for n in range(count)], bool)
    return Saved(
        by_policy={policy: mask & kept for policy, mask in masks.items()},
        on_chip=np.array([_is_on_chip(flat, n) for n in range(count)], bool),
    )


def _is_on_chip(flat: Flat, index: int) -> bool:
    value = flat.values[index]
    if value.core or value.producer < 0:
        return value.core
    leaf = flat.leaves[value.producer]
    return any(flat.values[i].core for i in leaf.ins)


def _is_kept(flat: Flat, index: int) -> bool:
    value = flat.values[index]
    return value.parameter < 0 and value.elements > 1


def _residuals_of(flat: Flat, leaf: Leaf) -> list[int]:
    if not any(flat.values[i].grad for i in leaf.outs):
        return []
    if matmul_roles(leaf.equation) is not None:
        left, right = leaf.ins[:2]
        kept = [left] if flat.values[right].grad else []
        return kept + ([right] if flat.values[left].grad else [])
    name = leaf.equation.primitive
    if name == "mul" and len(leaf.ins) == 2:
        left, right = leaf.ins
        return [a for a, b in ((left, right), (right, left)) if flat.values[b].grad]
    if is_linear(flat, leaf):
        return []
    return list(leaf.outs) if name in _BY_RESULT else [i for i in leaf.ins if flat.values[i].grad]


def _read_by_kernels(flat: Flat) -> set[int]:
    """Return what products and fused kernels with gradients of their own keep of their operands."""
    kept: set[int] = set()
    roots = _roots(flat)
    members: dict[int, list[Leaf]] = defaultdict(list)
    for number, leaf in enumerate(flat.leaves):
        if leaf.rematted:
            continue
        if is_fusible(leaf):
            members[roots[number]].append(leaf)
        else:
            kept.update(_residuals_of(flat, leaf))
    for group in members.values():
        if all(is_linear(flat, leaf) for leaf in group):
            continue
        made = {i for leaf in group for i in leaf.outs}
        kept.update(i for leaf in group for i in leaf.ins if i not in made and flat.values[i].grad)
    return kept
