"""Products of attention: sums of several, each of queries and keys of its own, and what they ask for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from .masks import Labels, Part, dtype_of
from .placed import PlacedDims, through
from .spans import NotThis
from .values import Sources


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Further:
    """A product that is added to scores, `by` times: its operands, and which labels of scores they have.

    What is summed over in it has negative labels, which are its own.
    """

    product: core.JaxprEqn
    query: Any
    key: Any
    of_query: Labels
    of_key: Labels
    by: float


def further_product(
    values: Sources,
    part: Part,
    found: tuple[core.JaxprEqn, tuple[tuple[core.JaxprEqn, int], ...]],
    first: core.JaxprEqn,
    sizes: Sequence[int],
    keys: int,
) -> Further | None:
    """Return what is added to scores as one more product of queries and keys; None if it is no such thing.

    Args:
      values: of the program.
      part: what is added, with the labels of its dimensions among those of the scores of `first`.
      found: a product, and the steps from it to what is added.
      first: the product that the labels number the dimensions of; `sizes` are theirs.
      sizes: of these.
      keys: the label of keys.
    """
    product, steps = found
    kinds = {str(dtype_of(atom)) for one in (first, product) for atom in one.invars}
    if len(kinds) > 1:
        return None
    try:
        placed = PlacedDims(product)
        own: Labels = tuple((d,) for d in range(len(placed.sizes)))
        by = part.fill
        for eqn, main in steps:
            by *= _number(values, eqn, main)
            own = through(eqn, own, placed.sizes)
        labels = _matched(own, part.labels, placed.sizes, sizes)
        (its_keys,) = (label for label, wanted in labels.items() if wanted == (keys,))
        placed.tell(its_keys)
    except (NotThis, ValueError):
        return None
    of_query, of_key = (
        tuple(tuple(d for one in dim for d in labels.get(one, (one,))) for dim in placed.operand(side))
        for side in (placed.query, 1 - placed.query)
    )
    return Further(
        product=product,
        query=product.invars[placed.query],
        key=product.invars[1 - placed.query],
        of_query=of_query,
        of_key=of_key,
        by=by,
    )


def _number(values: Sources, eqn: core.JaxprEqn, main: int) -> float:
    """Return what `eqn` multiplies its operand `main` by; raises NotThis if it does anything but move it."""
    name = eqn.primitive.name
    if name in ("add", "sub", "select_n", "tanh", "concatenate", "pad"):
        raise NotThis("")
    if name not in ("mul", "div"):
        return 1.0
    by = values.number(eqn.invars[1 - main])
    if not by or (name == "div" and main == 1):
        raise NotThis("")
    return by if name == "mul" else 1 / by


def _matched(
    own: Labels, wanted: Labels, own_sizes: Sequence[int], sizes: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Return which labels of scores each label of a product is, whose dimensions lie alike."""
    found: dict[int, tuple[int, ...]] = {}
    for mine, theirs in zip(own, wanted, strict=True):
        if len(mine) == 1:
            pairs = [(mine[0], theirs)]
        elif len(mine) == len(theirs):
            pairs = [(one, (other,)) for one, other in zip(mine, theirs, strict=True)]
        else:
            raise NotThis("")
        for one, others in pairs:
            if own_sizes[one] != math.prod(sizes[d] for d in others):
                raise NotThis("")
            found[one] = others
    if len(found) != len(own_sizes):
        raise NotThis("")
    return found


def fits(one: Further, batch: Sequence[int], free: Sequence[int], keys: int) -> bool:
    """Whether a product's keys are alike for all queries of a group, as attention's keys are."""
    of_key = {d for dim in one.of_key for d in dim if d >= 0}
    of_query = {d for dim in one.of_query for d in dim if d >= 0}
    return keys in of_key <= {keys, *batch} and bool(of_query & set(free)) and keys not in of_query


def rank(eqn: core.JaxprEqn) -> int:
    """Return how many dimensions a product keeps apart: of two that are added, the first has the most."""
    (_, (batch, _)) = eqn.params["dimension_numbers"]
    return len(batch)


def precision_of(*products: core.JaxprEqn) -> str | None:
    """Return what products ask for, None for what is always done; raises NotThis if they ask for several."""
    found = set()
    for product in products:
        asked = product.params["precision"]
        for one in asked if isinstance(asked, tuple) else (asked,):
            # Of half precision, what is multiplied as it is and summed in float32 is what is always done.
            usual = one is None or "DEFAULT" in str(one) or str(one).endswith("16_F32")
            found.add(None if usual else one)
    if len(found) > 1 or not all(one is None or isinstance(one, jax.lax.Precision) for one in found):
        raise NotThis(f"its products ask for precision {', '.join(str(one) for one in found)}")
    (one,) = found
    return None if one is None else one.name.lower()
