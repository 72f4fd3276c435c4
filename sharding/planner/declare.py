"""A Plan from what a user declares: a mesh, and rules from named dimensions and parameters to its axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ..errors import UserError, nearest_divisors
from ..hardware.axes import resolve_axes
from ..hardware.topology import Topology
from ..paths import by_path
from ..plans.record import ArrayPlan, DimPlan, Plan, axes_of
from ..program.program import Dim, Program
from ..program.tracing import trace
from ..rules.rules import Rules
from .choices.attention import choose
from .choices.remat import read

# What the first two dimensions of an array of the data are called in rules.
_DATA_NAMES = ("batch", "sequence")


def declare(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    *,
    topology: Topology | str,
    mesh: Mapping[str, int],
    rules: Mapping[str, Any] | None = None,
    names: Any = None,
    remat: str | Mapping[str, str] = "none",
    microbatches: int = 1,
    attention: str | None = None,
) -> Plan:
    """Return the Plan that the declared `mesh` and `rules` make of ``loss(params, batch)``.

    Args:
        loss: the unsharded function; it is traced, not run.
        params: a tree of arrays or ShapeDtypeStructs.
        batch: likewise, the global batch; its arrays are ``[batch, ...]`` or ``[batch, sequence, ...]``.
        topology: the devices.
        mesh: axis → size, one of which may be -1.
        rules: named dimension or path pattern → axes, over the defaults of `Rules.with_defaults`.
        names: a tree parallel to `params` of tuples of dimension names.
        remat: what layers keep for their backward pass: a policy of `transform.remat`, or names → places.
        microbatches: parts that the batch is worked through in, as in `transform.accumulate`.
        attention: as in `plan`: ``auto`` if not given.

    Raises:
        UserError: the mesh does not fit the topology, a rule cannot hold, or the batch does not divide.
    """
    topology = Topology.parse(topology) if isinstance(topology, str) else topology
    sizes = resolve_axes(mesh, topology.num_devices)
    declared = Rules(rules or {}).with_defaults()
    _check_batch(batch, declared, sizes, microbatches)
    data_names = _names_of_data(batch)
    of_batch = declared.specs(batch, sizes, data_names, partial=True)
    # A rule for a dimension of the data holds for no parameter, and so would count as matching nothing.
    rules_of_params = Rules(
        {key: rule for key, rule in (rules or {}).items() if key not in _DATA_NAMES},
        defaults=declared.defaults,
    )
    of_params = rules_of_params.specs(params, sizes, names)
    program = trace(
        loss, params, batch, names={1: data_names} if names is None else {0: names, 1: data_names}
    )
    policy = read(remat)
    kernel = choose(program, topology, attention)
    dims = _dims(program, declared, sizes)
    cut = {program.by_name[name].id: row.axes for name, row in dims.items()}
    plan = Plan(
        topology=str(topology),
        mesh=sizes,
        dims=dims,
        params=_arrays(params, of_params),
        batch=_arrays(batch, of_batch),
        remat=policy.remat,
        saved=policy.saved,
        microbatches=microbatches,
        notes=(*rules_of_params.notes(params, sizes, names), *kernel.notes_on(cut)),
        kernels=kernel.kernels if kernel.can(cut) else {},
    )
    _check_axes_work(plan)
    return plan


def _names_of_data(batch: Any) -> Any:
    return jax.tree.map(lambda leaf: (_DATA_NAMES + (None,) * leaf.ndim)[: leaf.ndim], batch)


def _arrays(tree: Any, specs: Any) -> dict[str, ArrayPlan]:
    leaves = by_path(tree)
    flat = jax.tree.structure(tree).flatten_up_to(specs)
    return {
        path: ArrayPlan(shape=tuple(leaf.shape), dtype=str(leaf.dtype), spec=tuple(spec))
        for (path, leaf), spec in zip(leaves.items(), flat, strict=True)
    }


def _dims(program: Program, rules: Rules, sizes: Mapping[str, int]) -> dict[str, DimPlan]:
    """Say how each dim is sharded while computing.

    An axis that shards the batch holds different rows on each of its devices, so that no other dimension
    can be spread over it while computing: parameters that are stored over it are gathered first.
    """
    of_batch = set(axes_of((*rules.spec(("batch",), (math.prod(sizes.values()),), sizes), None)[0]))
    planned = {}
    for dim in program.dims:
        if not dim.places:
            continue
        place = dim.places[0]
        label = _ruled_label(dim, rules)
        entry = (*rules.spec((label,), (dim.size,), sizes), None)[0] if label and dim.whole is None else None
        axes = tuple(axis for axis in axes_of(entry) if sizes[axis] > 1)
        if label != "batch":
            axes = tuple(axis for axis in axes if axis not in of_batch)
        planned[dim.name] = DimPlan(
            size=dim.size,
            axes=axes,
            argument=program.arguments[place.argument].position,
            path=place.path,
            dimension=place.dimension,
            part=place.part,
        )
    return planned


def _check_axes_work(plan: Plan) -> None:
    """Refuse a mesh axis that shards nothing: the devices along it would repeat each other's work."""
    arrays = [*plan.params.values(), *plan.batch.values()]
    working = {axis for row in arrays for entry in row.spec for axis in axes_of(entry)}
    working.update(axis for row in plan.dims.values() for axis in row.axes)
    for axis, size in plan.mesh.items():
        if size > 1 and axis not in working:
            raise UserError(
                f"mesh axis {axis}={size} shards nothing in this program; give it a rule, "
                f"or its devices to another axis, e.g. {axis}=1, data=-1"
            )


def _ruled_label(dim: Dim, rules: Rules) -> str | None:
    """Return the first of the dim's labels that some rule speaks of."""
    return next((label for label in dim.labels if label in rules.declared or label in rules.defaults), None)


def _check_batch(batch: Any, rules: Rules, sizes: Mapping[str, int], microbatches: int) -> None:
    spread = rules.declared.get("batch", rules.defaults.get("batch", ()))
    parts = {axis: sizes[axis] for axis in spread if axis in sizes}
    devices = math.prod(parts.values())
    if microbatches < 1:
        raise UserError(f"microbatches={microbatches} must be a whole number of at least 1")
    needed = devices * microbatches
    for leaf in jax.tree.leaves(batch):
        rows = leaf.shape[0] if leaf.ndim else 0
        if rows and rows % needed == 0:
            continue
        factors = {**parts, "microbatches": microbatches}
        written = " x ".join(f"{name}={size}" for name, size in factors.items())
        below = rows // needed * needed
        near = f"{below} or {below + needed} rows" if below else f"{needed} rows"
        if microbatches > 1 and rows and rows % devices == 0:
            near += f", or microbatches={nearest_divisors(rows // devices, microbatches)}"
        raise UserError(f"a batch of {rows} rows does not divide by {written} = {needed}; nearest: {near}")
