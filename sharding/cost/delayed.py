"""What delaying the gradients of layers' weights takes: their seconds, and the bytes that they are made of.

They are the products of the backward pass that stages do not wait for, one for each product of a layer with a
trained weight, of its other operand and the gradient of its result (`transform/pipeline/split.py`). Those of
experts are not among them: what carries a call of `ops.experts` out gives all of its gradients at once.
"""

from __future__ import annotations

import functools

import numpy as np

from .compute import Passes
from .living import Worked
from .profile import LAYERS, ProgramTables


@functools.lru_cache(maxsize=64)
def late_seconds(profile: ProgramTables, once: Passes) -> float:
    """Return the seconds that they take of a microbatch, in all layers: half of those of both gradients."""
    late, _ = _late(profile)
    return float(once.products_back[late].sum()) / 2.0


@functools.lru_cache(maxsize=64)
def kept_bytes(profile: ProgramTables, work: Worked) -> float:
    """Return the bytes that they are made of, of one microbatch and all layers; what several read is one.

    They are kept in the type that products take, which XLA casts them to where they are made.
    """
    late, weights = _late(profile)
    values = profile.products.values[late]
    operands = np.unique(values[:, :2][~weights[late]])
    sizes = work.saved * np.minimum(work.product / np.maximum(profile.values.item_bytes, 1.0), 1.0)
    return float(sizes[operands].sum() + sizes[np.unique(values[:, 2])].sum())


@functools.lru_cache(maxsize=16)
def _late(profile: ProgramTables) -> tuple[np.ndarray, np.ndarray]:
    """Return which products [M] are of a layer's weight, and which of their operands [M, 2] are weights."""
    products, table = profile.products, profile.parameters
    trained = np.append(table.argument[table.trained > 0], -2)
    weights = np.isin(profile.values.parameter[products.values[:, :2]], trained)
    in_layers = profile.steps.section[products.equation] == LAYERS
    # A product of a weight alone, or of two, has no gradient that stages wait for.
    alone = (weights.sum(axis=1) == 1) & ~products.grouped
    return in_layers & (products.gradients > 1) & alone, weights
