"""Names for what the trace found: the user's own where there are any. They decide nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ..errors import UserError, nearest
from ..paths import by_path, path_of
from .program import Argument

AxisNames = tuple[str | None, ...]


def _is_axis_names(node: Any) -> bool:
    return isinstance(node, (tuple, list)) and all(isinstance(n, str) or n is None for n in node)


def axis_names(args: Sequence[Any], names: Any) -> dict[tuple[int, str], AxisNames]:
    """Return (argument position, path) → the user's name of each array dimension.

    `names` is parallel to the first argument, or a dictionary from argument positions to trees parallel to
    those. Names that the arguments carry themselves (Flax's axis metadata) are found too.

    Raises:
        UserError: for a path that no argument has.
    """
    found: dict[tuple[int, str], AxisNames] = {}
    for position, arg in enumerate(args):
        found.update({(position, path): given for path, given in flax_axis_names(arg).items()})
    by_position = isinstance(names, Mapping) and bool(names) and all(isinstance(k, int) for k in names)
    trees: dict[int, Any] = dict(names) if by_position else {0: names} if names is not None else {}
    for position, tree in trees.items():
        if position not in range(len(args)):
            raise UserError(f"names are given for argument {position}, but there are {len(args)} arguments")
        known = by_path(args[position])
        for path, given in by_path(tree, _is_axis_names).items():
            if not _is_axis_names(given):
                raise UserError(f"the names at {path!r} are {given!r}, not a tuple of dimension names")
            if path not in known:
                raise UserError(
                    f"names are given at {path!r}, where argument {position} has no array; "
                    f"{nearest(path, known)}"
                )
            found[position, path] = tuple(given)
    return found


def flax_axis_names(tree: Any) -> dict[str, AxisNames]:
    """Return the axis names that Flax put beside arrays: path of the array → names.

    Reads boxes of linen (``Partitioned.names``) and variables of NNX (``sharding_names``, ``out_sharding``).
    Flax reads fewer names than the array has dimensions as a `PartitionSpec` is read: the last have none.
    """
    found: dict[str, AxisNames] = {}
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box):
        if _is_box(node):
            inside = jax.tree_util.tree_leaves_with_path(node)
            for inner, leaf in inside:
                names = _box_names(node)
                if names is not None:
                    unnamed = max(0, getattr(leaf, "ndim", 0) - len(names))
                    found[path_of((*keys, *inner))] = (*names, *(None,) * unnamed)
    return found


def _is_box(node: Any) -> bool:
    return _box_names(node) is not None


def _box_names(node: Any) -> AxisNames | None:
    if isinstance(node, tuple) or not (hasattr(node, "unbox") or hasattr(node, "get_metadata")):
        return None
    metadata = node.get_metadata() if hasattr(node, "get_metadata") else vars(node)
    for key in ("sharding_names", "out_sharding", "sharding", "names"):
        names = metadata.get(key) if isinstance(metadata, Mapping) else None
        if names is not None and _is_axis_names(tuple(names)):
            return tuple(names)
    return None


def names_of(
    given: Mapping[tuple[int, str], AxisNames], position: int, path: str, shape: tuple[int, ...]
) -> AxisNames:
    """Return the names of an array's dimensions, one for each.

    Raises:
        UserError: when the user gave more or fewer.
    """
    names = given.get((position, path), (None,) * len(shape))
    if len(names) != len(shape):
        raise UserError(
            f"{path!r} is shaped {list(shape)} but has {len(names)} dimension names: {list(names)}"
        )
    return names


def label_votes(arguments: Sequence[Argument]) -> tuple[dict[int, Counter[str]], dict[int, Counter[str]]]:
    """Count what the user calls each dim, where it is an array dimension by itself and where a part."""
    alone: dict[int, Counter[str]] = {}
    part: dict[int, Counter[str]] = {}
    for argument in arguments:
        for name, composition in zip(argument.names, argument.dims, strict=True):
            if name is not None:
                votes = alone if len(composition) == 1 else part
                for dim in composition:
                    votes.setdefault(dim, Counter())[name] += 1
    return alone, part


def unique(wanted: Sequence[tuple[str, int]]) -> list[str]:
    """Make the names unique: later dims of one name are numbered, unless they are named by their size.

    >>> unique([("embed", 64), ("embed", 64), ("", 12)])
    ['embed', 'embed.1', 'd2_12']
    """
    taken: set[str] = set()
    names: list[str] = []
    for number, (name, size) in enumerate(wanted):
        name = name or f"d{number}_{size}"
        candidate, count = name, 0
        while candidate in taken:
            count += 1
            candidate = f"{name}.{count}"
        taken.add(candidate)
        names.append(candidate)
    return names
