"""Which parameters are trained: what a user writes of it, and a tree of parameters in two by it.

Only floats (and complex numbers) have gradients. A parameter that is not trained lies in the state like any
other, is read by every step, and has no gradient and no array of the optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UserError, nearest
from ..paths import by_path, endings, matches, specificity, unique_paths
from .record import ArrayPlan, Decision


def is_float(leaf: Any) -> bool:
    """Whether an array can be trained: integers, bools and keys cannot.

    >>> is_float(jax.ShapeDtypeStruct((2,), "bfloat16")), is_float(jax.ShapeDtypeStruct((2,), "int8"))
    (True, False)
    """
    dtype = _dtype(leaf)
    # A plan has types by name, and NumPy knows no keys.
    return not str(dtype).startswith("key<") and jnp.issubdtype(dtype, jnp.inexact)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_trained(plan: Decision, path: str, row: ArrayPlan) -> bool:
    """Return whether `plan` trains the parameter at `path`."""
    return is_float(row) if plan.trainable is None else path in plan.trainable


def trained_paths(params: Any, trainable: Any) -> tuple[str, ...] | None:
    """Return the paths of the parameters that are trained, None where all floats are.

    >>> params = {name: jax.ShapeDtypeStruct((2,), "float32") for name in ("base", "lora_a", "lora_b")}
    >>> trained_paths(params, "lora_*")
    ('lora_a', 'lora_b')
    >>> trained_paths(params, {"*_b": False})
    ('base', 'lora_a')
    >>> trained_paths(params, {"base": False, "lora_a": True, "lora_b": True})
    ('lora_a', 'lora_b')

    Args:
        params: a tree of arrays or ShapeDtypeStructs.
        trainable: None for all floats; a pattern over paths or several, which are trained alone; patterns →
            bool, the closest of which decides, what none matches being trained; or a tree of bools like
            `params`, or like the upper part of it. A pattern that matches a folder matches what is in it.

    Raises:
        UserError: a pattern matches nothing that can be trained, or says nothing, the tree is not like the
            parameters, an array that has no gradient is asked to be trained, or nothing is.
    """
    if trainable is None:
        return None
    leaves = by_path(params)
    floats = [path for path, leaf in leaves.items() if is_float(leaf)]
    if isinstance(trainable, str):
        trainable = (trainable,)
    if _are_patterns(trainable):
        chosen = _matched(dict.fromkeys(trainable, True), leaves, floats, others=False)
    elif _is_by_pattern(trainable, params):
        chosen = _matched(trainable, leaves, floats, others=True)
        _check_each_says_something(trainable, floats)
    else:
        chosen = _masked(trainable, params)
    if not chosen:
        raise UserError(f"trainable leaves none of the {len(floats)} parameters of floats to train")
    return None if len(chosen) == len(floats) else chosen


def _are_patterns(trainable: Any) -> bool:
    return (
        isinstance(trainable, Sequence) and bool(trainable) and all(isinstance(one, str) for one in trainable)
    )


def _is_by_pattern(trainable: Any, params: Any) -> bool:
    """Whether it maps patterns to bools, and is not a tree like the upper part of `params`."""
    if not isinstance(trainable, Mapping):
        return False
    if not all(isinstance(key, str) and _is_bool(value) for key, value in trainable.items()):
        return False
    return not (isinstance(params, Mapping) and {*trainable} == {*params})


def _in(pattern: str, path: str) -> bool:
    return matches(pattern, path) or matches(f"{pattern}/*", path)


def _check_each_says_something(patterns: Mapping[str, bool], floats: Sequence[str]) -> None:
    """Raise UserError for a pattern → True that takes nothing back: all else is trained too."""
    frozen = [pattern for pattern, wanted in patterns.items() if not wanted]
    for pattern, wanted in patterns.items():
        found = [path for path in floats if wanted and _in(pattern, path)]
        if found and not any(_in(one, path) for one in frozen for path in found):
            raise UserError(
                f"trainable {pattern}: True says nothing, since what no pattern matches is trained; "
                f'give trainable={pattern!r} to train that alone, or add "*": False'
            )


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _matched(
    patterns: Mapping[str, bool], leaves: Mapping[str, Any], floats: Sequence[str], *, others: bool
) -> tuple[str, ...]:
    for pattern, wanted in patterns.items():
        found = [path for path in leaves if _in(pattern, path)]
        if not found:
            folders = [
                "/".join(path.split("/")[:n]) for path in leaves for n in range(1, path.count("/") + 1)
            ]
            near = nearest(pattern, endings([*leaves, *folders], pattern))
            raise UserError(f"trainable {pattern} matches no parameter; {near}")
        if wanted and not any(path in floats for path in found):
            raise UserError(
                f"trainable {pattern} matches {found[0]} of type {_dtype(leaves[found[0]])}, which has no "
                "gradient: only floats can be trained"
            )

    def decided(path: str) -> bool:
        matching = [pattern for pattern in patterns if _in(pattern, path)]
        return patterns[max(matching, key=specificity)] if matching else others

    return tuple(path for path in floats if decided(path))


def _masked(mask: Any, params: Any) -> tuple[str, ...]:
    try:
        whole = jax.tree.broadcast(mask, params)
    except ValueError:
        have, written = list(by_path(params)), list(by_path(mask))
        odd = next((path for path in written if not any(_below(path, one) for one in have)), None)
        lacking = next((path for path in have if not any(_below(one, path) for one in written)), None)
        what = f"has {odd!r}, which no parameter has" if odd is not None else f"lacks {lacking!r}"
        near = nearest(odd, have) if odd is not None else "give a bool for each parameter, or patterns"
        raise UserError(f"trainable {what}; {near}") from None
    chosen = []
    rows = zip(by_path(params).items(), jax.tree.leaves(whole), strict=True)
    for (path, leaf), wanted in rows:
        if not _is_bool(wanted):
            raise UserError(f"trainable has {wanted!r} for {path!r}; give True or False")
        if wanted and not is_float(leaf):
            raise UserError(
                f"trainable has True for {path!r} of type {_dtype(leaf)}, which has no gradient; give False"
            )
        if wanted:
            chosen.append(path)
    return tuple(chosen)


def _below(upper: str, path: str) -> bool:
    return not upper or path == upper or path.startswith(f"{upper}/")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """A tree of parameters in two; `trained` has those that are trained, and None where others are."""

    trained: Any
    _leaves: tuple[Any, ...]
    _places: tuple[bool, ...]
    _structure: Any

    @property
    def places(self) -> tuple[int, ...]:
        """The numbers of the leaves that are trained."""
        return tuple(n for n, place in enumerate(self._places) if place)

    def joined(self, trained: Any) -> Any:
        """Return the whole tree, with the arrays of `trained` for those that are trained."""
        new = iter(jax.tree.leaves(trained))
        rows = zip(self._leaves, self._places, strict=True)
        return self._structure.unflatten([next(new) if place else old for old, place in rows])


def split(params: Any, trained: Collection[str] | None) -> Split:
    """Take a tree of parameters apart.

    `trained` are the paths of those that are trained, None for all floats.

    >>> parts = split({"base": jnp.int8([1]), "scale": jnp.float32([2])}, None)
    >>> parts.trained["base"] is None, parts.joined({"base": None, "scale": 3.0})["scale"]
    (True, 3.0)
    """
    rows, structure = jax.tree_util.tree_flatten_with_path(params)
    chosen = None if trained is None else frozenset(trained)
    paths = unique_paths([keys for keys, _ in rows])
    places = tuple(
        is_float(leaf) and (chosen is None or path in chosen)
        for path, (_, leaf) in zip(paths, rows, strict=True)
    )
    leaves = tuple(leaf for _, leaf in rows)
    return Split(
        trained=structure.unflatten(
            [leaf if place else None for leaf, place in zip(leaves, places, strict=True)]
        ),
        _leaves=leaves,
        _places=places,
        _structure=structure,
    )
