"""Planned steps serialised for the process that compiles them: StableHLO, nothing is pickled."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax import export
from jax.sharding import AbstractMesh, AxisType

from ..errors import UserError
from ..hardware.attached import quieted
from ..hardware.topology import Topology
from ..ops.cudnn import CUSTOM_CALLS, described
from ..paths import by_path
from ..plans import arrays
from ..plans.record import Record
from ..transform.compose import PlannedLoss
from ..transform.step import abstract_state, updated

if TYPE_CHECKING:
    import optax

# XLA's names of platforms → those that programs are lowered for.
_PLATFORMS = {"tpu": "tpu", "gpu": "cuda", "cuda": "cuda", "cpu": "cpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """A serialised program, how many of its first arguments it donates, and the paths of all of them."""

    program: bytes
    donated: int
    arguments: list[str]


def export_step(
    plan: Record,
    loss: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    optimizer: optax.GradientTransformation,
    topology: Topology,
    loss_state: Any = None,
) -> Exported:
    """Return the training step of `plan`, lowered for `topology` without its devices or its compiler.

    The program takes the leaves of the state, then those of the batch, and returns the leaves of the new
    state, then the metrics. Arguments are those of `verify.verify`.

    Raises:
      UserError: the step cannot be lowered for the topology's platform.
    """
    mesh = abstract_mesh(plan)
    state = abstract_state(plan, params, optimizer, loss_state)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state, batch))
    leaves, tree = jax.tree.flatten(shapes)
    kept = jax.tree.leaves(arrays.shardings(plan, state, mesh))
    planned = PlannedLoss(plan, loss, mesh)

    def step(*arrays: Any) -> tuple[list[Any], dict[str, Any]]:
        after, metrics = updated(planned, optimizer, *jax.tree.unflatten(tree, arrays))
        return jax.tree.leaves(after), metrics

    jitted = jax.jit(
        step,
        in_shardings=(*kept, *jax.tree.leaves(arrays.shardings(plan, batch, mesh, "batch"))),
        out_shardings=(kept, None),
        donate_argnums=tuple(range(len(kept))),
    )
    platform = _PLATFORMS.get(topology.chip.platform)
    if platform is None:
        raise UserError(f"no compiler for {topology.chip.name} ({topology.chip.platform}) is known")
    try:
        # The checks are for programs that a later version runs; this one is compiled at once and dropped.
        calls = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
        # Lowering asks JAX for a device, though none is used.
        with quieted(), described() if platform == "cuda" else contextlib.nullcontext():
            exported = export.export(jitted, platforms=(platform,), disabled_checks=calls)(*leaves)
    except NotImplementedError as error:
        raise UserError(f"the step cannot be lowered for {platform}: {error}") from None
    paths = ["/".join(path.split("/")[1:]) for path in by_path(shapes)]
    return Exported(program=bytes(exported.serialize()), donated=len(kept), arguments=paths)


def abstract_mesh(plan: Record) -> AbstractMesh:
    """Return the mesh of `plan` without devices."""
    return AbstractMesh(
        tuple(plan.mesh.values()), tuple(plan.mesh), axis_types=(AxisType.Auto,) * len(plan.mesh)
    )
