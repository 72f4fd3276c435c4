"""Arrays of layers that were written out, stacked for a scan: one equation of the program.

The user's own arrays stay what is kept, stored and learnt; the stack is made of them in every step, in the
type that the layers read it in. It is a jitted call whose body is plain: others see through it.
"""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .primitives import Trait, primitives
from .program import Argument, Scope, Stack

_VIEWS = primitives(Trait.VIEW)
_NAME = "meshwright_stack"


def stacked(values: Sequence[Any], dtype: Any = None) -> Any:
    """Return arrays of one shape stacked along a new first dimension, as one equation, cast to `dtype`."""
    return _call(None if dtype is None else jnp.dtype(dtype))(*values)


@functools.cache
def _call(dtype: Any) -> Callable[..., Any]:
    def stack(*values: Any) -> Any:
        cast = values if dtype is None else [jax.lax.convert_element_type(one, dtype) for one in values]
        # `jnp.stack` is a primitive of its own in some generations; this is what others write.
        return jax.lax.concatenate([jax.lax.expand_dims(one, [0]) for one in cast], 0)

    stack.__name__ = stack.__qualname__ = _NAME
    return jax.jit(stack)


def is_stack(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` is a call of `stacked`."""
    return eqn.primitive.name == "jit" and eqn.params.get("name") == _NAME


def stacks_of(scope: Scope, arguments: Sequence[Argument]) -> tuple[Stack, ...]:
    """Return the parameters that a program's `scope` stacks; one that is stacked twice counts once."""
    origins = {
        var: argument.index
        for var, argument in zip(scope.jaxpr.invars, arguments, strict=True)
        if argument.is_parameter
    }
    found: list[Stack] = []
    for members, dim, item_bytes in _stacks_in(scope, origins):
        known = {index for stack in found for index in stack.arguments}
        if len(set(members)) == len(members) and not known.intersection(members):
            paths = [arguments[index].path for index in members]
            path = path_of_stack(paths)
            found.append(Stack(arguments=tuple(members), path=path, dim=dim, item_bytes=item_bytes))
    return tuple(found)


def _stacks_in(scope: Scope, origins: dict[Any, int]) -> Iterator[tuple[list[int], int, int]]:
    for equation in scope.equations:
        eqn = equation.eqn
        given = [None if isinstance(atom, core.Literal) else origins.get(atom) for atom in eqn.invars]
        if is_stack(eqn):
            members = [index for index in given if index is not None]
            if len(members) == len(given) and equation.outs[0][0]:
                aval: Any = eqn.outvars[0].aval
                yield members, equation.outs[0][0][0], int(aval.dtype.itemsize)
        elif equation.primitive in _VIEWS and given[0] is not None:
            origins[eqn.outvars[0]] = given[0]
        for inner in equation.scopes if not is_stack(eqn) and any(one is not None for one in given) else ():
            if len(inner.jaxpr.invars) == len(given):
                rows = zip(inner.jaxpr.invars, given, strict=True)
                yield from _stacks_in(inner, {var: index for var, index in rows if index is not None})


def path_of_stack(paths: Sequence[str]) -> str:
    """Return the path that layers' parameters have in common, with ``*`` for the layer's number.

    >>> path_of_stack(["blocks/0/mlp/up", "blocks/1/mlp/up"])
    'blocks/*/mlp/up'
    >>> path_of_stack(["params/Block_0/Dense_1/kernel", "params/Block_1/Dense_1/kernel"])
    'params/Block_*/Dense_1/kernel'
    """
    parts = [path.split("/") for path in paths]
    if len({len(one) for one in parts}) > 1:
        return _starred(paths)
    return "/".join(_starred(words) for words in zip(*parts, strict=True))


def _starred(words: Sequence[str]) -> str:
    if len(set(words)) == 1:
        return words[0]
    # What differs are numbers: `up_1` and `up_10` have no more in common than `up_`.
    head = _shared(words).rstrip(string.digits)
    tail = _shared([word[len(head) :][::-1] for word in words])[::-1].lstrip(string.digits)
    return f"{head}*{tail}"


def _shared(words: Sequence[str]) -> str:
    """Return what all words begin with."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*words, strict=False))
    return "".join(letters[0] for letters in alike)
