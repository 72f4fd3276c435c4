"""A loss and its arguments as users write them: arrays in any tree, to a scalar or ``(scalar, aux)``."""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UserError, wrong
from ..paths import by_path
from .jaxpr import asked
from .untraceable import told

_NUMBERS = (bool, int, float, complex, np.generic)


def abstract(tree: Any, what: str) -> Any:
    """Return a tree of arrays, or of what is like them, as ShapeDtypeStructs without weak types.

    Of ``jnp.full(shape, 0.1)`` JAX remembers that its type was not asked for, until the first step makes it
    like any other: the program is that of all steps but the first.

    >>> abstract({"scale": 2.0, "gain": jnp.full((3,), 0.1)}, "parameter")["gain"].weak_type
    False

    Args:
        tree: arrays, ShapeDtypeStructs and numbers.
        what: what a leaf is, for the error: ``parameter`` or ``batch array``.

    Raises:
        UserError: there is something else among them, a function or a text.
    """
    check_leaves(tree, what)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def insisting(tree: Any, what: str) -> Any:
    """Return a tree of arrays without weak types; arguments and errors are as of `abstract`."""
    check_leaves(tree, what)

    def insist(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        weak = getattr(leaf, "weak_type", False)
        return jax.lax.convert_element_type(leaf, leaf.dtype) if weak else leaf

    return jax.tree.map(insist, tree)


def check_leaves(tree: Any, what: str) -> None:
    """Raise UserError, naming the first, if anything in `tree` is neither an array nor a number."""
    for path, leaf in by_path(tree).items():
        if isinstance(leaf, _NUMBERS):
            continue
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and _counts(leaf.dtype):
            continue
        where = f" {path!r}" if path else ""
        raise UserError(
            f"{what}{where} is {_in_words(leaf)}, which is neither an array nor a number; keep it out of the "
            "tree: in the loss itself, or in a static field"
        )


def _counts(dtype: Any) -> bool:
    """Whether there are arrays of JAX's of a type: of numbers, bools or keys."""
    if not isinstance(dtype, np.dtype):
        return True
    # NumPy has one letter for the narrow floats and for records of several fields.
    return dtype.kind not in "OUSMmV" or (dtype.names is None and jnp.issubdtype(dtype, jnp.number))


def checked(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return `loss`; it raises UserError if it gives no scalar of floats and no ``(scalar, aux)``.

    So it does where JAX cannot trace it; see `untraceable`.

    >>> def rows(params, x):
    ...     return x @ params
    >>> checked(rows)(jnp.ones(3), jnp.ones((2, 3)))
    Traceback (most recent call last):
    ...
    meshwright.sharding.errors.UserError: the loss (rows) gives an array of shape (2,): return its mean or sum
    """
    if not callable(loss):
        raise wrong("loss", loss, "is no function of (params, batch)")
    name = _named(loss)

    def check(result: Any) -> None:
        wrong = _wrong(result)
        if wrong is not None:
            raise UserError(f"the loss ({name}) {wrong}")

    return asked(loss, functools.partial(told, name), check)


def _wrong(result: Any) -> str | None:
    """Return what is wrong with what a loss gave, None if nothing is."""
    if result is None:
        return "gives None; does it lack a return?"
    value, aux = result, {}
    if isinstance(result, tuple):
        if len(result) != 2:
            return f"gives a tuple of {len(result)}: return a scalar, or (scalar, aux) with all else in aux"
        value, aux = result
    if not isinstance(value, _NUMBERS) and not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return f"gives {_in_words(value)}: return a scalar, or (scalar, aux)"
    if jnp.shape(value) != ():
        return f"gives an array of shape {jnp.shape(value)}: return its mean or sum"
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"gives a scalar of type {dtype}, which has no gradient: return floats"
    try:
        check_leaves(aux, "aux value")
    except UserError as error:
        return f"gives an aux that cannot be had: {error}"
    return None


def _in_words(leaf: Any) -> str:
    if isinstance(leaf, str):
        return f"the text {leaf!r}"
    if callable(leaf):
        return f"a function ({getattr(leaf, '__name__', type(leaf).__name__)})"
    of = f" of {leaf.dtype}" if isinstance(leaf, np.ndarray) else ""
    return f"an object of type {type(leaf).__name__}{of}"


def _named(loss: Callable[..., Any]) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    name = getattr(loss, "__name__", type(loss).__name__)
    code = getattr(inspect.unwrap(loss), "__code__", None)
    if code is None or code.co_filename.startswith("<"):
        return name
    return f"{name}, {pathlib.Path(code.co_filename).name}:{code.co_firstlineno}"
