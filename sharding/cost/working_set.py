"""The working set of a layer that goes back: bytes that its products hold, and what is gathered for them.

What `tensor` cuts along the sequence is gathered before the products that take it, and their gradients for it
are sums over that axis, of which each device gets its part. At once there are

- what fused kernels keep of the layer, and what its attention reads beside that
- what one or several products take, whole, and the gradients of what they give
- the gradient of the layer's result, gathered
- the products' sums, and where there are several, all of them added; one array where products add to what
  another gave (`Compiler.fuses_products`). Where parts go round the axis (`Compiler.rings`) they are of each
  product the two that went round, one both ways, one that has come in, and the two that these are added into

and of the products of a loss whose parts go round, the gradient of what they give, and two parts of it, which
are multiplied at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .placement import BACKWARD, FORWARD, Placement
from .profile import AFTER, LAYERS, ProgramTables

# Axes that cut what is passed on between layers and gather it where it is worked with.
GATHERED_OVER = ("tensor", "context")
# Where parts go round an axis: those of a product's sums in memory at once, and those multiplied at a time.
_SUMS, _TAKEN = 5, 2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WorkingSet:
    """Bytes of a microbatch: `layer` [stack], of a layer that is run again; `passing` [stack], of it what is
    no value that would be kept; `loss`, beside the largest array of the loss. `again` [V] are those of values
    that layers have because they are run again, besides what they carry.
    """

    layer: np.ndarray
    again: np.ndarray
    passing: np.ndarray
    loss: float


def gathers(placement: Placement, mesh: Mapping[str, int], phase: int, count: int) -> np.ndarray | None:
    """Return how many parts each value [V] is gathered from in a pass, None where none is."""
    found = None
    for traffic in placement.traffic:
        if traffic.kind == "all_gather" and traffic.phase == phase and traffic.axis in GATHERED_OVER:
            found = np.ones(count) if found is None else found
            found[traffic.values] *= mesh[traffic.axis]
    return found


def working_set(
    profile: ProgramTables,
    placement: Placement,
    mesh: Mapping[str, int],
    size: np.ndarray,
    live: np.ndarray,
    *,
    rings: int,
    fuses: bool,
    product_bytes: float,
    lanes: int,
    slices: float = 0.0,
) -> WorkingSet | None:
    """Return the working sets of layers and the loss, None where they are no more than `live` and one value.

    Args:
      profile: the program's tables.
      placement: the parts that devices have of values, and what is gathered.
      mesh: the sizes of its axes.
      size: bytes of values [V] as they lie between products.
      live: values [V] that fused kernels keep of a layer and elementwise work does not give.
      rings: fewest devices of an axis that parts of products go round, 0 for none.
      fuses: whether products make what is elementwise before them, and add to what another gave.
      product_bytes: of an element as products take it, at most.
      lanes: elements of a row in memory, at least.
      slices: bytes of keys and values that attention reads in parts, for each element of its result.
    """
    values, parts = profile.values, gathers(placement, mesh, FORWARD, len(size))
    if parts is None and fuses:
        return None
    parts = np.ones(len(size)) if parts is None else parts
    of = _taken(profile)
    here = parts[of.taken] > fuses
    if not here.any():
        return None
    taken, results, section = of.taken[here], of.results[here], of.section[here]
    each, of_each, count = np.unique(taken, return_inverse=True, return_counts=True)
    narrow = np.minimum(1.0, product_bytes / values.item_bytes[results])
    gradients = np.bincount(of_each, weights=size[results] * narrow)
    own, whole, made = size[each], size[each] * parts[each], profile.saved.by_policy["none/given"][each]
    round_axis = (parts[each] >= rings) & (rings > 0)
    if fuses:
        # Each is gathered again where its gradient is.
        sums, others, more = whole, own * made, whole - own
    else:
        # Those of experts' rows are added when a loop over tiles is at its end, and what it takes is gone.
        tiles = np.bincount(of_each, weights=of.grouped[here]) > 0
        sums = (count + ((count > 1) & ~tiles)) * whole
        others, more = whole - own * ~made, 0.0
    sums = np.where(round_axis, count * _SUMS / parts[each] * whole, sums)
    of_stack = np.zeros(len(each), int)
    np.maximum.at(of_stack, of_each, 1 + np.where(section == LAYERS, values.stack[results], -1))
    stacks = 1 + profile.stacks
    back = _largest(profile, _back(placement, mesh, size), values.stack)
    alone = _sums(live * size, values.stack, stacks) + _attended(profile, placement, lanes, slices) + back
    # What comes after one in a layer is gone when its gradient is taken.
    before = (of_stack[:, None] == of_stack) & (each[:, None] >= each)
    layer, passing = np.zeros(stacks), np.zeros(stacks)
    np.maximum.at(layer, of_stack, alone[of_stack] + before @ others + more + gradients + sums)
    np.maximum.at(passing, of_stack, whole + gradients + sums + back[of_stack])
    written = gradients * (1.0 + _TAKEN / parts[each]) * round_axis
    written *= np.bincount(of_each, weights=section == AFTER) > 0
    again = live * size * ~profile.saved.by_policy["full"]
    return WorkingSet(layer=layer[1:], again=again, passing=passing[1:], loss=float(written.max()))


class _Taken(NamedTuple):
    """Products with a parameter, but for attention's: the values that they take and give, and their section.

    `grouped` says that the parameters are experts'.
    """

    taken: np.ndarray
    results: np.ndarray
    section: np.ndarray
    grouped: np.ndarray


def _taken(profile: ProgramTables) -> _Taken:
    """Return the products whose gradients for what they take are summed, found once for a program."""
    found = profile.along.get(_Taken)
    if found is None:
        products, values = profile.products, profile.values
        weights = values.parameter[products.values[:, :2]] >= 0
        taken = np.where(weights[:, 1], products.values[:, 0], products.values[:, 1])
        rows = (weights.sum(axis=1) == 1) & (products.call < 0) & values.grad[taken]
        found = profile.along[_Taken] = _Taken(
            taken=taken[rows],
            results=products.values[rows, 2],
            section=profile.steps.section[products.equation[rows]],
            grouped=products.grouped[rows],
        )
    return found


def _back(placement: Placement, mesh: Mapping[str, int], size: np.ndarray) -> np.ndarray:
    """Return the bytes of gradients [V] that are gathered in the backward pass, 0 of others."""
    parts = gathers(placement, mesh, BACKWARD, len(size))
    return np.zeros(len(size)) if parts is None else size * parts * (parts > 1)


def _attended(profile: ProgramTables, placement: Placement, lanes: int, slices: float) -> np.ndarray:
    """Return the bytes of what gradients of kernels of attention read besides, by stack from -1 on.

    That is a number of four bytes for each row of their result, which lies in a row of its own, and `slices`.
    """
    values, rows = profile.values, list(profile.attended)
    elements = values.bytes[rows] / values.item_bytes[rows] * placement.value_fraction[rows]
    weights = elements * (4.0 * lanes / np.maximum(values.width[rows], 1.0) + slices)
    return np.bincount(values.stack[rows] + 1, weights=weights, minlength=1 + profile.stacks)


def _sums(weights: np.ndarray, stack: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(stack + 1, weights=weights, minlength=count)


def _largest(profile: ProgramTables, weights: np.ndarray, stack: np.ndarray) -> np.ndarray:
    found = np.zeros(1 + profile.stacks)
    np.maximum.at(found, stack + 1, weights)
    return found
