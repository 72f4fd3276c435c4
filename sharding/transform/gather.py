"""Parameters as they are stored, gathered where they are used, and what their gradients wait for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding

from ..program.jaxpr import run

# What a stored parameter goes through before it is gathered.
PASSING = frozenset({"convert_element_type", "transpose"})


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter, or a layer's slice of one, as it is stored; `spec` says how. Gathered when used.

    `reduced` is the spec that its gradient is brought to.
    """

    value: Any
    spec: tuple[Any, ...]
    reduced: tuple[Any, ...]

    def row(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the specs of a slice along the first dimension."""
        return self.spec[1:], self.reduced[1:]

    def passed(self, eqn: core.JaxprEqn) -> Stored:
        """Return what a cast or a transposition of it gives, stored still."""
        value = run(eqn, [self.value])[0]
        if eqn.primitive.name != "transpose":
            return self.holding(value)
        order = eqn.params["permutation"]
        return Stored(value, _permuted(self.spec, order), _permuted(self.reduced, order))

    def holding(self, value: Any) -> Stored:
        """Return `value`, stored as this one."""
        return dataclasses.replace(self, value=value)


def raw(inputs: Sequence[Any]) -> list[Any]:
    """Return the arrays of `inputs`, of which some are stored."""
    return [value.value if isinstance(value, Stored) else value for value in inputs]


def stored_like(likes: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Return `values`, stored where those of `likes` are."""
    return [
        like.holding(value) if isinstance(like, Stored) else value
        for like, value in zip(likes, values, strict=True)
    ]


def gathered(value: Any, used: NamedSharding, reduced: Sequence[NamedSharding]) -> Any:
    """Bring a stored parameter to where it is used; its gradient is brought to `reduced`, one by one."""

    @jax.custom_vjp
    def gather(value: Any) -> Any:
        return jax.lax.with_sharding_constraint(value, used)

    def backward(_: None, gradient: Any) -> tuple[Any]:
        return (_brought(gradient, reduced),)

    gather.defvjp(lambda value: (gather(value), None), backward)
    return gather(value)


def sums_of(value: Any, reduced: Sequence[NamedSharding], travels: Any = None) -> Any:
    """Return an array of zeros whose gradient becomes that of a stored parameter, brought to `reduced`.

    A loop that reads the parameter in a smaller type adds its gradient up there, in the parameter's own type
    (`learning`); it is brought in the type `travels`, if given.
    """

    @jax.custom_vjp
    def zeros(value: Any) -> Any:
        return jax.lax.with_sharding_constraint(jnp.zeros_like(value), reduced[0])

    def backward(_: None, gradient: Any) -> tuple[Any]:
        sent = gradient if travels is None else gradient.astype(travels)
        return (_brought(sent, reduced).astype(gradient.dtype),)

    zeros.defvjp(lambda value: (zeros(value), None), backward)
    return zeros(value)


def learning(value: Any, sums: Any) -> Any:
    """Return `value`; its gradient is that of `sums` (`sums_of`), in the type of `sums`."""
    dtype = sums.dtype

    @jax.custom_vjp
    def learn(value: Any, sums: Any) -> Any:
        del sums
        return value

    learn.defvjp(
        lambda value, sums: (value, None),
        lambda _, gradient: (jnp.zeros_like(gradient), gradient.astype(dtype)),
    )
    return learn(value, sums)


def _brought(gradient: Any, shardings: Sequence[NamedSharding]) -> Any:
    for sharding in shardings:
        gradient = jax.lax.with_sharding_constraint(gradient, sharding)
    return gradient


def settled(inputs: Sequence[Any]) -> list[Any]:
    """Return `inputs`; the gradients of all are there, and reduced, before any of them is used.

    Else XLA takes the gradients of what comes before first, and meanwhile keeps the parameter gathered and
    its gradient whole.
    """
    values = raw(inputs)
    places = [n for n, value in enumerate(values) if jnp.issubdtype(jnp.result_type(value), jnp.inexact)]
    if len(places) < 2:
        return list(inputs)
    for n, value in zip(places, _together(tuple(values[n] for n in places)), strict=True):
        values[n] = value
    return stored_like(inputs, values)


@jax.custom_vjp
def _together(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values


_together.defvjp(
    lambda values: (values, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),)
)


@jax.custom_vjp
def before_gradients(value: Any) -> Any:
    """Return a loss; its gradients are taken when it is there.

    Where they need nothing of the loss's own forward pass, XLA leaves that for last and keeps what it reads.
    """
    return value


before_gradients.defvjp(
    lambda value: (value, value),
    lambda value, gradient: (jax.lax.optimization_barrier((gradient, value))[0],),
)


def _permuted(spec: tuple[Any, ...], order: Sequence[int]) -> tuple[Any, ...]:
    return tuple(spec[n] if n < len(spec) else None for n in order)
