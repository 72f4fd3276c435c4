"""Parameters by name: the `/`-joined path of every leaf, and patterns over such paths."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UserError


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
            path=path,
            shape=tuple(getattr(leaf, "shape", ())),
            in_record=any(isinstance(key, attribute) for key in keys[1:-1]),
        )
        for path, (keys, leaf) in zip(unique_paths([keys for keys, _ in leaves]), leaves, strict=True)
    ], structure


def folders_of(groups: Iterable[Sequence[str]]) -> list[str]:
    """Return a name for each group of paths: the folder that they share, or the first one's path.

    A folder ends where ``*`` stands for several.

    >>> folders_of([["blocks/*/mlp/up", "blocks/*/mlp/down"], ["w"], ["blocks/1/up", "blocks/2/up"]])
    ['blocks', 'w', 'blocks/1/up']
    """
    found: list[str] = []
    for paths in groups:
        shared = itertools.takewhile(
            lambda words: len({*words}) == 1 and "*" not in words[0],
            zip(*(path.split("/") for path in paths), strict=False),
        )
        name = "/".join(words[0] for words in shared)
        found.append(name if name and name not in found else paths[0])
    return found


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return path → leaf, in the tree's order.

    >>> by_path({"a": {"b": 1}, "c": 2}), by_path({"a/b": 1, "a": {"b": 2}})
    ({'a/b': 1, 'c': 2}, {'a/b': 2, 'a%2Fb': 1})
    """
    import jax

    try:
        rows = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    except ValueError as error:
        if "sorting pytree dictionary keys" not in str(error):
            raise
        raise UserError(
            "a dictionary of the tree has keys of several kinds (3 and 'a', say), which JAX cannot order: "
            "give all keys of one dictionary one kind"
        ) from None
    paths = unique_paths([keys for keys, _ in rows])
    return {path: leaf for path, (_, leaf) in zip(paths, rows, strict=True)}


def map_by_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Return a tree like `tree` of what `function` gives of each leaf's path and the leaf."""
    import jax

    rows = by_path(tree)
    return jax.tree.structure(tree).unflatten([function(path, leaf) for path, leaf in rows.items()])


def unique_paths(keys: Sequence[tuple[Any, ...]]) -> list[str]:
    """Return the path of each leaf of one tree.

    Where two leaves would have one path (``{"a/b": …, "a": {"b": …}}``), slashes inside of keys are ``%2F``.
    """
    paths = [path_of(one) for one in keys]
    counts = Counter(paths)
    if len(counts) == len(paths):
        return paths
    return [
        path if counts[path] == 1 else "/".join(path_of((key,)).replace("/", "%2F") for key in one)
        for path, one in zip(paths, keys, strict=True)
    ]


def names_by_path(names: Any) -> dict[str, tuple[str | None, ...]]:
    """Return the named dimensions of every array, by path, from a tree whose leaves are tuples of names.

    Raises UserError for any other leaf.
    """
    found = {}
    for path, leaf in by_path(names, _is_names).items():
        if leaf is None:
            continue
        if not _is_names(leaf):
            raise UserError(f"the names at {path!r} are {leaf!r}, not a tuple of dimension names")
        found[path] = tuple(leaf)
    return found


def _is_names(node: Any) -> bool:
    if type(node) not in (tuple, list) or not all(item is None or isinstance(item, str) for item in node):
        return False
    # A list of nothing but None is a list of arrays without names.
    return type(node) is tuple or any(node)


def path_of(keys: tuple[Any, ...]) -> str:
    """Join a JAX key path with slashes: ``layers/attention/query``."""
    import jax

    # Flax NNX holds each array in a variable, whose `.value` is no part of the parameter's name.
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def called(kind: str, path: str) -> str:
    """Return what to call an array of a tree in a sentence; a tree that is one array has no path.

    >>> called("parameter", "mlp/up"), called("parameter", "")
    ("parameter 'mlp/up'", 'the parameter')
    """
    return f"{kind} {path!r}" if path else f"the {kind}"


def by_suffix(path: str, found: Mapping[str, Any]) -> str | None:
    """Return the key of `found` that is `path` or, failing that, its longest ending at a `/`.

    Optimizer states mirror the parameters below a prefix of their own: ``0/mu/layers/wq``. A bare array has
    no path, and any ends with it.
    """
    return next((ending for ending in endings_of(path) if ending in found), None)


def endings_of(path: str) -> Iterator[str]:
    """Yield `path` and its endings at a `/`, the longest first, the empty one last."""
    parts = path.split("/")
    for start in range(len(parts) + 1):
        yield "/".join(parts[start:])


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
