"""A planned loss: the user's own function with the plan's transforms around it, in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from ..plans import arrays
from ..plans.record import Decision, check_runs
from ..xla.reduction import reduction_steps
from .accumulate import accumulate
from .constrain import constrain
from .name import name_values
from .remat import remat


def apply(plan: Decision, loss: Callable[..., Any], mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """Return `loss(params, batch)` worked through as planned on `mesh`: same signature, same values."""
    check_runs(plan)
    named = name_values(loss, plan.saved) if plan.saved else loss
    sharded = constrain(
        named,
        mesh,
        lambda program: arrays.axes_of_dims(plan, program),
        lambda params: arrays.specs(plan, params),
        lambda params: arrays.specs_of_moments(plan, params),
        kernels=plan.kernels,
        platform=_platform(plan, mesh),
        steps=reduction_steps(plan.mesh, plan.topology, plan.compiler_options),
    )
    return accumulate(remat(sharded, plan.remat, plan.saved), plan.microbatches)


def _platform(plan: Decision, mesh: Mesh | AbstractMesh) -> str:
    """Return what is compiled for: what the mesh's devices are, or those described if it has none."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    return plan.topology.chip.platform
