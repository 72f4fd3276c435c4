"""A user's own model in small: the dims that its loss has at small sizes, and drawn parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...sharding.plans.record import Decision
from ...sharding.plans.reduced import Reduction
from ...sharding.program.program import Dim, Program
from ...sharding.program.resized import looked_up, resized
from ...sharding.program.tracing import trace
from .planning import Shapes

# From this size of a dimension on → about what it becomes.
_LEAST = ((1024, 64), (64, 16), (16, 8), (0, 4))
# Ids that a model without a table is given.
_IDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    """The arguments of a loss in small.

    Attributes:
        params: ShapeDtypeStructs.
        batch: likewise.
        state: a tuple of one tree likewise, or none.
        sizes: name of a dim of parameters → its size, of those that became smaller.
        ids: how many ids a token may be.
    """

    params: Any
    batch: Any
    state: tuple[Any, ...]
    sizes: Mapping[str, int]
    ids: int


def small(plan: Decision, how: Reduction, shapes: Shapes, sequence: int) -> Small:
    """Return the arguments of a loss with as many dims at small sizes as it takes."""
    args = (shapes.params, shapes.batch, *(() if shapes.state is None else (shapes.state,)))
    program = trace(shapes.loss, *args, names=shapes.names, state=(2,), rows=("batch", "sequence"))
    sizes = {dim.id: _size(plan, how, program, dim, sequence) for dim in program.dims if dim.places}
    found, kept = resized(shapes.loss, args, program, sizes)
    return Small(
        params=found[0],
        batch=found[1],
        state=tuple(found[2:]),
        sizes={
            program.dims[dim].name: size
            for dim, size in sorted(kept.items())
            if not program.dims[dim].batch_like
        },
        ids=looked_up(program, kept) or _IDS,
    )


def _size(plan: Decision, how: Reduction, program: Program, dim: Dim, sequence: int) -> int:
    """Return the small size of a dim."""
    planned = plan.dims.get(dim.name)
    if planned is not None and "stage" in planned.axes:
        return min(how.layers, dim.size)
    if dim.stacked:
        return min(2, dim.size)
    if program.batch_dims == (dim.id,) or "batch" in dim.labels:
        return min(how.rows, dim.size)
    if "sequence" in (dim.name, *dim.labels):
        return min(sequence, dim.size)
    return how.size(dim.size, next(least for size, least in _LEAST if dim.size >= size))


def drawn(tree: Any, seed: int) -> Any:
    """Return arrays of a tree of shapes: floats drawn about as models begin with them, all else zero.

    Matrices of the size of products' rounding, vectors about one, as scales and variances are.
    """
    leaves, structure = jax.tree.flatten(tree)
    # By NumPy: JAX compiles for a second and more to draw an array, for each shape that a model has.
    random = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [_drawn(leaf, random, key) for leaf, key in zip(leaves, keys, strict=True)]
    )


def _drawn(leaf: Any, random: np.random.Generator, key: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(key, leaf.shape) if leaf.shape else key
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
    noise = random.standard_normal(leaf.shape, np.float32)
    if len(leaf.shape) < 2:
        return jnp.asarray(1 + noise / 8, leaf.dtype)
    return jnp.asarray(noise / max(leaf.shape[-2:]) ** 0.5, leaf.dtype)
