"""A state as a list of named leaves."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ...sharding.errors import UserError

# The type of a key → what it is an implementation of, as `jax.random.key` calls it.
_IMPLEMENTATIONS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


def leaf_names(tree: Any) -> list[str]:
    """Return a name for each leaf, in the order of `jax.tree.leaves`: ``params/embed/table``.

    Where names would meet (``{"a/b": …, "a": {"b": …}}``, or ``{"a/b": …, "a": …}``, which cannot be nested),
    slashes inside of keys are ``%2F``.
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    names = [_joined(path) for path in paths]
    counts = Counter(names)
    above = {name[:at] for name in names for at, char in enumerate(name) if char == "/"}
    meeting = {name for name in names if counts[name] > 1 or name in above}
    return [
        "/".join(_joined((key,)).replace("/", "%2F") for key in path)
        if name in meeting or any(name.startswith(f"{other}/") for other in meeting)
        else name or "(state)"
        for path, name in zip(paths, names, strict=True)
    ]


def _joined(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def nest(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Arrange one value for each name in nested dicts: ``params/embed`` goes to ``["params"]["embed"]``.

    What Orbax stores is then independent of the classes in the state (optax's named tuples, empty states).
    """
    nested: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        *outer, last = name.split("/")
        inner = nested
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return nested


def pick(nested: Any, names: Sequence[str]) -> list[Any]:
    """Return the values that `nest` arranged, in the order of `names`."""
    found = []
    for name in names:
        inner = nested
        for key in name.split("/"):
            inner = inner[key]
        found.append(inner)
    return found


def check_arrays(state: Any) -> None:
    """Refuse what cannot be saved before anything is written: all leaves must be live `jax.Array`s.

    Raises `UserError` naming the leaf.
    """
    leaves = jax.tree.leaves(state)
    if not leaves:
        raise UserError("the state to save has no arrays in it")
    names = leaf_names(state)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two leaves of the state are named {twice}; give their keys different names")
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, jax.Array):
            kind = f"{type(leaf).__module__}.{type(leaf).__name__}".removeprefix("builtins.")
            raise UserError(
                f"state leaf {name} is a {kind}, not a jax.Array; place it on the mesh with jax.device_put"
            )
        if leaf.size == 0:
            raise UserError(f"state leaf {name} of shape {list(leaf.shape)} holds nothing; leave it out")
        if leaf.is_deleted():
            raise UserError(f"state leaf {name} was donated to an earlier step; save what that step returned")


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of JAX's typed random keys."""
    return jax.numpy.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def keys_as_numbers(tree: Any) -> Any:
    """Return a tree, of arrays or abstract, with random keys as the uint32 numbers that are saved of them."""

    def numbers(leaf: Any) -> Any:
        if not is_key(leaf):
            return leaf
        if isinstance(leaf, jax.Array):
            return jax.random.key_data(leaf)
        found = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=leaf.sharding)

    return jax.tree.map(numbers, tree)


def keys_again(leaves: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Return `leaves` with numbers as random keys again where `like`, abstract leaves, has keys."""
    found = []
    for leaf, wanted in zip(leaves, like, strict=True):
        if is_key(wanted):
            wrap = functools.partial(jax.random.wrap_key_data, impl=_IMPLEMENTATIONS[str(wanted.dtype)])
            leaf = jax.jit(wrap, out_shardings=wanted.sharding)(leaf)
        found.append(leaf)
    return found


def nbytes(leaves: Sequence[Any]) -> int:
    """Return the bytes of all leaves, each counted once however often it is replicated."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def by_devices(leaves: Sequence[Any]) -> list[list[int]]:
    """Return the indices of `leaves` in groups that live on the same devices: one jitted call serves each."""
    groups: dict[frozenset[Any], list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(frozenset(leaf.sharding.device_set), []).append(index)
    return list(groups.values())


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return what a program compiled for `leaf` needs to know of it."""
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=getattr(leaf, "weak_type", False)
    )
