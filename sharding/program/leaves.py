"""What stands in a user's tree that is no array of JAX's, in words."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UserError
from ..paths import by_path, called
from .jaxpr import is_array

NUMBERS = (bool, int, float, complex, np.generic)


def check_leaves(tree: Any, what: str) -> None:
    """Raise UserError, naming the first, if anything in `tree` is neither an array nor a number."""
    for path, leaf in by_path(tree).items():
        if (said := not_an_array(leaf)) is not None:
            raise UserError(f"{called(what, path)} is {said}")


def not_an_array(leaf: Any) -> str | None:
    """Say what `leaf` is if JAX has no array of it and cannot make one, and what to give; None if it can."""
    if isinstance(leaf, np.ma.MaskedArray):
        return "a masked array, which JAX has none of: give its filled() and its mask"
    if isinstance(leaf, (np.ndarray, np.generic)):
        return _of_numpy(leaf)
    if isinstance(leaf, NUMBERS):
        return None
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        if hasattr(leaf, "__array__"):
            return f"{in_words(leaf)}, which is neither an array nor a number: give np.asarray of it"
        return _out_of_the_tree(leaf)
    if not _is_known(leaf.dtype):
        return f"{in_words(leaf)} of {leaf.dtype}, which is no type of JAX's: give np.asarray of it"
    if isinstance(leaf, jax.Ref):
        return "a reference (jax.new_ref), which a step cannot hold: give what is in it, reference[...]"
    return None


def gone(tree: Any) -> str | None:
    """Return the path of the first array of `tree` that was deleted (donated, say), None if none was."""
    for path, leaf in by_path(tree).items():
        if is_array(leaf) and leaf.is_deleted():
            return path
    return None


def in_words(leaf: Any) -> str:
    """Return what a leaf is called in a sentence."""
    if isinstance(leaf, str):
        return f"the text {leaf!r}"
    if callable(leaf):
        return f"a function ({getattr(leaf, '__name__', type(leaf).__name__)})"
    of = f" of {leaf.dtype}" if isinstance(leaf, np.ndarray) else ""
    return f"an object of type {type(leaf).__name__}{of}"


def _out_of_the_tree(leaf: Any) -> str:
    said = f"{in_words(leaf)}, which is neither an array nor a number"
    return f"{said}; keep it out of the tree: in the loss itself, or in a static field"


def _of_numpy(leaf: Any) -> str | None:
    """Say what is wrong with an array or a number of NumPy's; JAX has not all of its types."""
    dtype = leaf.dtype
    if _is_known(dtype):
        return None
    kind = "an array" if leaf.shape else "a number"
    if not dtype.isnative:
        return f"{kind} of {dtype.str}, another byte order than this machine's: give .astype({dtype.name!r})"
    if dtype.kind in "fc":
        return f"{kind} of {dtype}, which JAX has none of: give .astype('float64'), or a narrower type"
    if dtype.kind in "mM":
        return f"{kind} of {dtype}, which JAX has none of: give its numbers, .astype('int64')"
    return _out_of_the_tree(leaf)


@functools.lru_cache(maxsize=256)
def _is_known(dtype: Any) -> bool:
    """Whether there are arrays of JAX's of a type: of numbers, bools or keys."""
    try:
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return True
        dtype = np.dtype(dtype)
    except TypeError:
        return False
    # NumPy counts differences of times among integers.
    if not dtype.isnative or dtype.char in "gG" or dtype.kind == "m":
        return False
    return dtype.kind == "b" or jnp.issubdtype(dtype, jnp.number)
