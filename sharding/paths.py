"""Parameters by name: the `/`-joined path of every leaf, and patterns over such paths."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """An array of a tree: where it is and its shape."""

    path: str
    """Keys joined by `/`, as in ``layers/attention/wq``."""
    shape: tuple[int, ...]
    in_record: bool
    """Below a field of an inner named tuple, as all that an optimizer keeps is."""


def flatten(tree: Any) -> tuple[list[Leaf], Any]:
    """Return the arrays of any pytree and its structure."""
    import jax

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    attribute = jax.tree_util.GetAttrKey
    return [
        Leaf(
            path=path_of(keys),
            shape=tuple(getattr(leaf, "shape", ())),
            in_record=any(isinstance(key, attribute) for key in keys[1:-1]),
        )
        for keys, leaf in leaves
    ], structure


def by_path(tree: Any) -> dict[str, Any]:
    """Return path → leaf, in the tree's order."""
    import jax

    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def names_by_path(names: Any) -> dict[str, tuple[str | None, ...]]:
    """Return the named dimensions of every array, by path, from a tree whose leaves are tuples of names."""
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(names, is_leaf=_is_names)
    return {path_of(keys): leaf for keys, leaf in leaves if leaf is not None}


def _is_names(node: Any) -> bool:
    return type(node) is tuple and all(item is None or isinstance(item, str) for item in node)


def path_of(keys: tuple[Any, ...]) -> str:
    """Join a JAX key path with slashes: ``layers/attention/query``."""
    import jax

    # Flax NNX holds each array in a variable, whose `.value` is no part of the parameter's name.
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def by_suffix(path: str, found: Mapping[str, Any]) -> str | None:
    """Return the key of `found` that is `path` or, failing that, its longest ending at a `/`.

    Optimizer states mirror the parameters below a prefix of their own: ``0/mu/layers/wq``.
    """
    parts = path.split("/")
    for start in range(len(parts)):
        ending = "/".join(parts[start:])
        if ending in found:
            return ending
    return None


def matches(pattern: str, path: str) -> bool:
    """Whether a glob matches a path or an ending of it that starts after a `/`; ``*`` also crosses `/`."""
    return _compiled(pattern).fullmatch(path) is not None


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*/)?{fnmatch.translate(pattern)}", re.DOTALL)


def specificity(pattern: str) -> tuple[bool, int]:
    """Return how closely a pattern says what it matches; the greater wins."""
    return ("*" not in pattern, len(pattern.replace("*", "")))


def endings(paths: Iterable[str], pattern: str) -> list[str]:
    """Return the last parts of each path, as many as `pattern` has: what it might have meant."""
    count = pattern.count("/") + 1
    return list(dict.fromkeys("/".join(path.split("/")[-count:]) for path in paths))
