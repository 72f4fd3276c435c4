"""A loss and its arguments as users write them: arrays in any tree, to a scalar or ``(scalar, aux)``."""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import UserError, wrong
from ..words import file_or_cell
from .jaxpr import asked
from .leaves import NUMBERS, check_leaves, in_words
from .untraceable import told


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

    return asked(loss, functools.partial(told, name, lambda *args: _takes(loss, args)), check)


def _takes(loss: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a loss gives what it has to, of these arguments."""
    found: list[str | None] = []

    def function(*args: Any) -> Any:
        result = loss(*args)
        found.append(_wrong(result))
        return result

    try:
        jax.eval_shape(function, *args)
    except Exception:  # The user's own function may raise anything.
        return False
    return found == [None]


def _wrong(result: Any) -> str | None:
    """Return what is wrong with what a loss gave, None if nothing is."""
    if result is None:
        return "gives None; does it lack a return?"
    value, aux = result, {}
    if isinstance(result, tuple):
        if len(result) != 2:
            return f"gives a tuple of {len(result)}: return a scalar, or (scalar, aux) with all else in aux"
        value, aux = result
    if not isinstance(value, NUMBERS) and not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return f"gives {in_words(value)}: return a scalar, or (scalar, aux)"
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


def _named(loss: Callable[..., Any]) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    name = getattr(loss, "__name__", type(loss).__name__)
    code = getattr(inspect.unwrap(loss), "__code__", None)
    file = "<" if code is None else file_or_cell(code.co_filename)
    if code is None or file.startswith("<"):
        return name
    return f"{name}, {pathlib.Path(file).name}:{code.co_firstlineno}"
