"""Rounds of ticks as the loops of a program: each stretch of ticks is compiled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .schedule import Rounds, Stretch

Array = Any

# Does some work in a tick: (work, state, tick) to the state, and rows of what the head gives.
Tick = Callable[[frozenset[Any], Any, Array], tuple[Any, Any]]


def run_rounds(found: Sequence[Rounds], head: Any, tick: Tick, state: Any) -> tuple[Any, list[Any]]:
    """Run rounds from tick -1 on; return the state, and the rows of all ticks with the work of a `head`."""
    rows, first = [], -1
    for one in found:
        state, more = _rounds(one, head, tick, state, first)
        rows += more
        first += one.ticks * one.times
    return state, [jnp.concatenate(some) for some in zip(*rows, strict=True)]


def _rounds(one: Rounds, head: Any, tick: Tick, state: Any, first: int) -> tuple[Any, list[Any]]:
    """Run the stretches of a round, `one.times`; return the rows of heads, a list or none."""
    if one.times == 1:
        return _stretches(one, head, tick, state, jnp.int32(first))
    begins = first + one.ticks * jnp.arange(one.times)
    state, found = lax.scan(lambda state, begin: _stretches(one, head, tick, state, begin), state, begins)
    return state, jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), found)


def _stretches(whole: Rounds, head: Any, tick: Tick, state: Any, first: Array) -> tuple[Any, list[Any]]:
    rows = []
    for one in whole.stretches:
        state, found = _stretch(one, tick, state, first)
        rows += [found] if head in one.work else []
        first = first + one.ticks
    return state, rows


def _stretch(one: Stretch, tick: Tick, state: Any, first: Array) -> tuple[Any, Any]:
    return lax.scan(lambda state, t: tick(one.work, state, t), state, first + jnp.arange(one.ticks))
