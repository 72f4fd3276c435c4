"""A step's metrics: the norm of its gradients, and names for whatever aux values a loss gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..paths import path_of

# Numbers of one name that a log of steps takes; larger arrays stay on the devices that made them.
LOGGED = 64


def named(aux: Any, taken: Iterable[str]) -> dict[str, Any]:
    """Return every array of `aux` by name; none of the names is `taken`.

    The name is the path below a dictionary or a record, and below ``aux`` for what stands at no name: a bare
    value, an item of a tuple. A name that is taken gets ``aux/`` in front.

    >>> named({"loss": 1, "parts": (2, 3)}, ["loss"])
    {'aux/loss': 1, 'parts/0': 2, 'parts/1': 3}
    >>> named((4, {"hits": 5}), []), named(6, [])
    ({'aux/0': 4, 'aux/1/hits': 5}, {'aux': 6})
    """
    used = set(taken)
    found: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(aux):
        path = path_of(keys)
        if not keys:
            path = "aux"
        elif isinstance(keys[0], (jax.tree_util.SequenceKey, jax.tree_util.FlattenedIndexKey)):
            path = f"aux/{path}"
        while path in used:
            path = f"aux/{path}"
        used.add(path)
        found[path] = leaf
    return found


def whole(metrics: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Return `metrics` with what a log takes whole on every device, so that each process can read it."""
    every = NamedSharding(mesh, PartitionSpec())
    return {
        name: jax.lax.with_sharding_constraint(value, every)
        if jnp.ndim(value) > 0 and jnp.size(value) <= LOGGED
        else value
        for name, value in metrics.items()
    }


def norm(gradients: Any) -> Any:
    """Return the root of the sum of squares over all gradients, of complex ones |z|², in float32 at least."""
    return jnp.sqrt(sum((_squares(leaf) for leaf in jax.tree.leaves(gradients)), jnp.float32(0)))


def _squares(leaf: Any) -> Any:
    if jnp.iscomplexobj(leaf):
        return _squares(leaf.real) + _squares(leaf.imag)
    wide = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    return jnp.sum(jnp.square(leaf.astype(wide)))
