"""The path of an array in a pytree, written as users write it: ``layers/attention/query``."""

from __future__ import annotations

from typing import Any


def path_of(keys: Any) -> str:
    """Join a JAX key path with slashes."""
    import jax

    return jax.tree_util.keystr(keys, simple=True, separator="/")


def paths(tree: Any) -> dict[str, Any]:
    """Return path → leaf, in the tree's order."""
    import jax

    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tail_match(path: str, known: Any) -> str | None:
    """Return the longest of the `known` paths that `path` ends with, whole parts only.

    An optimiser's moments stand at ``…/mu/<path of the parameter>``, so this finds whose they are.

    >>> tail_match("1/0/mu/layers/query", {"layers/query": 0, "query": 0})
    'layers/query'
    """
    parts = path.split("/")
    for start in range(len(parts)):
        candidate = "/".join(parts[start:])
        if candidate in known:
            return candidate
    return None
