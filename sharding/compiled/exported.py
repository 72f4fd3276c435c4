"""A planned step as bytes that another process compiles: StableHLO, nothing pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from ..errors import UserError

if TYPE_CHECKING:
    import optax

    from ..planner.plan import Plan
    from ..topology import Topology

# XLA's names of platforms → those that programs are lowered for.
_PLATFORMS = {"tpu": "tpu", "gpu": "cuda", "cuda": "cuda", "cpu": "cpu"}


def export_step(
    plan: Plan,
    loss: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    optimizer: optax.GradientTransformation,
    topology: Topology,
) -> tuple[bytes, int]:
    """Return the training step of `plan` lowered for `topology`, which need not be here, and what it donates.

    The program takes the leaves of the state, then those of the batch, and gives the leaves of the new state,
    then the metrics; the number returned is that of the state's leaves. No compiler is loaded.
    """
    from jax import export

    from ..transform.step import abstract_state, planned_update

    mesh = abstract_mesh(plan)
    state = abstract_state(params, optimizer)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state, batch))
    leaves, tree = jax.tree.flatten(shapes)
    kept = jax.tree.leaves(plan.shardings(state, mesh))
    update = planned_update(plan, loss, optimizer, mesh)

    def step(*arrays: Any) -> list[Any]:
        return jax.tree.leaves(update(*jax.tree.unflatten(tree, arrays)))

    count = len(kept)
    metrics = len(jax.eval_shape(step, *leaves)) - count
    jitted = jax.jit(
        step,
        in_shardings=(*kept, *jax.tree.leaves(plan.shardings(batch, mesh, "batch"))),
        out_shardings=[*kept, *[None] * metrics],
        donate_argnums=tuple(range(count)),
    )
    platform = _PLATFORMS.get(topology.chip.platform)
    if platform is None:
        raise UserError(f"no compiler for {topology.chip.name} ({topology.chip.platform}) is known")
    try:
        exported = export.export(jitted, platforms=(platform,))(*leaves)
    except NotImplementedError as error:
        raise UserError(f"the step cannot be lowered for {platform}: {error}") from None
    return bytes(exported.serialize()), count


def abstract_mesh(plan: Plan) -> jax.sharding.AbstractMesh:
    """Return the plan's mesh without devices."""
    from jax.sharding import AbstractMesh, AxisType

    return AbstractMesh(
        tuple(plan.mesh.values()), tuple(plan.mesh), axis_types=(AxisType.Auto,) * len(plan.mesh)
    )
