"""Look-ups, equations that read whole rows of a table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_Mode = jax.lax.GatherScatterMode

# How many times as many rows as a device looks up a table has at least that is read where it is stored. With
# fewer, gathering it sends about as much, and before anything waits for it.
MANY_ROWS = 64


def looks_up_rows(eqn: core.JaxprEqn) -> bool:
    """Whether an equation reads whole rows of a table of floats, ``table[ids]``, one for each id."""
    if eqn.primitive.name != "gather":
        return False
    avals: list[Any] = [atom.aval for atom in (*eqn.invars, eqn.outvars[0])]
    table, ids, out = avals
    numbers = eqn.params["dimension_numbers"]
    of_ids = len(ids.shape) - 1
    return (
        jnp.issubdtype(table.dtype, jnp.inexact)
        and eqn.params["mode"] in (_Mode.CLIP, _Mode.FILL_OR_DROP, _Mode.PROMISE_IN_BOUNDS)
        and tuple(eqn.params["slice_sizes"]) == (1, *table.shape[1:])
        and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims) == tuple(range(of_ids, len(out.shape)))
    )
