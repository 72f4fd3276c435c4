"""Work that a loop over ticks does in several of its stretches, traced once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


class Once:
    """A function of trees of arrays, traced when first called with arrays of such types, then run again.

    Each stretch of ticks is a loop of its own, whose body has the same layers, head and gradients as the
    others': taking their gradients anew each time is most of what tracing a pipeline takes. The function may
    read what is outside of all these loops, and nothing that one of them carries but by its arguments.

    >>> import jax.numpy as jnp
    >>> calls = []
    >>> double = Once(lambda x: calls.append(x) or {"twice": 2 * x})
    >>> [double(jnp.float32(n))["twice"].item() for n in range(3)], len(calls)
    ([0.0, 2.0, 4.0], 1)
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Return what the function gives."""
        # JAX keeps what it has traced of a function on arrays of such types.
        traced, result = jax.make_jaxpr(self._function, return_shape=True)(*args)
        found = core.jaxpr_as_fun(_copy(traced))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(result), found)


def _copy(value: Any) -> Any:
    """Return a program, or what else is among the parameters of an equation, with programs of its own.

    JAX writes one that it meets again as a function, which libtpu's partitioner refuses where kernels are
    called in it: it loses what axes the caller works by hand.
    """
    # Since 0.12 both are one class, which holds its constants.
    if isinstance(value, core.Jaxpr):
        return value.replace(eqns=[eqn.replace(params=_copy(eqn.params)) for eqn in value.eqns])
    if isinstance(value, core.ClosedJaxpr):
        return core.ClosedJaxpr(_copy(value.jaxpr), value.consts)
    if type(value) is dict:
        return {name: _copy(one) for name, one in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (tuple, list) else value
