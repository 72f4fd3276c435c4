"""What a planned training step takes on one of 8 devices over what the unsharded one takes, as compiled."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
import zoo
from meshwright.sharding import Plan, plan
from meshwright.sharding.transform.step import train_step

_OPTIMIZER = optax.adamw(1e-3)


def measure(name: str, scale: int, *, guard: bool | None = None) -> dict[str, Any]:
    """Return the bytes of one device unsharded and planned, and what part of the parameters is replicated.

    `guard` is as of `train_step`.
    """
    case = zoo.MODELS[name](scale=scale)
    params, batch = case.shapes()
    alone = plan(case.loss, params, batch, topology="cpu:1", optimizer=_OPTIMIZER)
    spread = plan(case.loss, params, batch, topology="cpu:8", optimizer=_OPTIMIZER)
    whole, part = (_bytes(case, made, batch, guard) for made in (alone, spread))
    total = sum(math.prod(row.shape) for row in spread.params.values())
    kept = sum(math.prod(row.shape) for row in spread.params.values() if not row.spec)
    return {
        "model": name,
        "parameters": total,
        "unsharded_bytes": whole,
        "device_bytes": part,
        "share": part / whole,
        "replicated": kept / total,
        "mesh": {axis: size for axis, size in spread.mesh.items() if size > 1},
    }


def _bytes(case: zoo.Case, made: Plan, batch: Any, guard: bool | None) -> int:
    mesh = made.make_mesh(jax.devices()[: math.prod(made.mesh.values())])
    step = train_step(made, case.loss, case.init, batch, _OPTIMIZER, mesh=mesh, guard=guard)
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        batch,
        step.batch,
    )
    found = step.update.lower(step.abstract_state, placed).compile().memory_analysis()
    # Donated arguments are the results.
    return found.argument_size_in_bytes + found.temp_size_in_bytes
