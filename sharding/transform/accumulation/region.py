"""The region in which devices work through their own rows: what lies in it, and what leaves it summed.

The axes that cut the rows are manual there. What parts of the batch give is summed on each device over its
own parts, and over the devices once, after the loop: left to XLA, gradients are reduced in each turn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ...plans import arrays
from ...plans.record import Decision
from ...plans.specs import Spec, axes_in, axes_of, cut_into, only
from ...program.jaxpr import Traced
from .proof import InParts, in_parts
from .values import Array, NotInParts

_OVER: dict[str, Callable[..., Array]] = {
    "sum": lax.psum,
    "max": lax.pmax,
    "min": lax.pmin,
    "or": lambda value, axes: lax.pmax(value.astype(jnp.int32), axes) > 0,
    "and": lambda value, axes: lax.pmin(value.astype(jnp.int32), axes) > 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowRegion:
    """`axes` of `mesh` cut the rows, the major one first, and are manual; so are `lanes`.

    Devices along `lanes` have the same rows, and take turns at their parts: of `turns` that follow one
    another each has one. Where these are fewer than devices, several have the same one, and the first counts.

    `params` and `state` are the specs in which their leaves are stored, `reduced` those of the gradients;
    `read` is the loss in the parts of all devices, which follow one another on each.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]
    params: tuple[Spec, ...]
    reduced: tuple[Spec, ...]
    state: tuple[Spec, ...]
    read: InParts
    lanes: tuple[str, ...] = ()
    turns: int = 1

    @property
    def manual(self) -> tuple[str, ...]:
        """All axes that are manual."""
        return (*self.axes, *self.lanes)

    def turn(self) -> Array:
        """Return which of the parts that follow one another a device has, inside of the region."""
        return lax.axis_index(self.lanes) % self.turns if self.lanes else jnp.int32(0)

    @property
    def devices(self) -> int:
        """In how many parts the rows lie."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def number(self) -> Array:
        """Return which of these parts a device has, inside of the region."""
        return lax.axis_index(self.axes) if self.axes else jnp.int32(0)

    def run(
        self,
        body: Callable[..., Any],
        params: Sequence[Array],
        batch: Sequence[Array],
        cut: Sequence[bool],
        state: Sequence[Array],
        others: Any,
        places: Sequence[int],
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """Return what ``body(params, batch, state, others)`` gives: sums, gradients, and arrays of parts.

        The leaves of the batch that are `cut` are a device's own rows, `others` the same on all. Sums are
        complete; gradients, of the parameters at `places`, are a device's own and leave it summed; arrays of
        parts lead with a device's parts, and leave it with those of all.
        """
        rest = [
            tuple(axis for axis in self.manual if axis not in axes_in(self.params[place])) for place in places
        ]
        rows, apart_rows = (
            PartitionSpec(self.axes or None),
            PartitionSpec(self.axes or None, self.lanes or None),
        )

        def apart(*args: Any) -> Any:
            sums, gradients, parts = body(*args)
            return sums, [one[None] for one in gradients], [one[:, None] for one in parts]

        sums, gradients, parts = jax.shard_map(
            apart,
            mesh=self.mesh,
            in_specs=(
                [PartitionSpec(*only(spec, self.manual)) for spec in self.params],
                [rows if one else PartitionSpec() for one in cut],
                [PartitionSpec(*only(spec, self.manual)) for spec in self.state],
                PartitionSpec(),
            ),
            out_specs=(
                PartitionSpec(),
                [
                    PartitionSpec(axes or None, *only(self.params[place], self.manual))
                    for axes, place in zip(rest, places, strict=True)
                ],
                apart_rows,
            ),
            axis_names=set(self.manual),
            check_vma=False,
        )(list(params), list(batch), list(state), others)
        grown = [self._summed(n, one) for n, one in zip(places, gradients, strict=True)]
        own = [one[:, : self.turns] for one in parts]
        return list(sums), grown, [one.reshape(-1, *one.shape[2:]) for one in own]

    def _summed(self, place: int, gradient: Array) -> Array:
        """Return a gradient whose first dimension are the devices that have a share of it."""
        goal = NamedSharding(self.mesh, PartitionSpec(*self.reduced[place]))
        return lax.with_sharding_constraint(jnp.sum(gradient, axis=0), goal)

    def total(self, combine: str, value: Array) -> Array:
        """Return what all devices have of a sum, or a maximum, …, inside of the region."""
        dtype = value.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            # XLA on a CPU combines nothing smaller in a region.
            value = value.astype(jnp.promote_types(dtype, jnp.float32))
        if combine == "sum" and self.turns < math.prod(self.mesh.shape[axis] for axis in self.lanes):
            value = jnp.where(lax.axis_index(self.lanes) < self.turns, value, jnp.zeros_like(value))
        return _OVER[combine](value, self.manual).astype(dtype)


def region_of(plan: Decision, mesh: Mesh | AbstractMesh, traced: Traced, read: InParts) -> RowRegion | None:
    """Return the region that a plan's parts are worked through in, or None where XLA is to lay them out.

    `read` is the traced loss in the plan's parts. A region is made where gradients are partial sums over an
    axis that stores few of them: they would be reduced for each part. The axes that cut the rows have to cut
    nothing else, and the loss to come in as many parts as all devices have, in as many passes.
    """
    params, batch, *state = traced.args
    axes = axes_of_rows(plan, specs_of_rows(plan, batch, read.rows))
    stored = flat_specs(plan, params)
    of_state = flat_specs(plan, state[0], "state") if state else ()
    if not axes or any(mixes(spec, axes) for spec in (*stored, *of_state)):
        return None
    if not any(_reduced_late(stored, jax.tree.leaves(params), axis) for axis in axes):
        return None
    devices = cut_into(axes, plan.mesh)
    if read.rows % (read.parts * devices):
        return None
    try:
        parts = in_parts(traced, read.parts * devices, by_block=True, prepares=bool(read.prepared))
    except NotInParts:
        return None
    if parts.levels.passes > read.levels.passes or parts.apart.keys() != read.apart.keys():
        return None
    reduced = flat_specs(plan, params, "moments")
    return RowRegion(mesh=mesh, axes=axes, params=stored, reduced=reduced, state=of_state, read=parts)


def specs_of_rows(plan: Decision, batch: Any, rows: int) -> list[Spec]:
    """Return the specs of the arrays of a batch that lead with its rows."""
    specs = zip(flat_specs(plan, batch, "batch"), jax.tree.leaves(batch), strict=True)
    return [spec for spec, leaf in specs if leaf.shape[:1] == (rows,)]


def axes_of_rows(plan: Decision, rows: Sequence[Spec], spared: Collection[str] = ()) -> tuple[str, ...]:
    """Return the axes that cut the rows and nothing else that is computed with, or none.

    They may cut the plan's dims that are `spared`.
    """
    leads = {axes_of(spec[0]) if spec else () for spec in rows}
    if len(leads) != 1:
        return ()
    axes = tuple(axis for axis in leads.pop() if plan.mesh[axis] > 1)
    others = {axis for spec in rows for axis in axes_in(spec[1:])}
    for name, row in plan.dims.items():
        if name not in spared and (row.argument != 1 or row.dimension or row.part):
            others.update(row.axes)
    return () if others.intersection(axes) else axes


def _reduced_late(stored: Sequence[Spec], params: Sequence[Any], axis: str) -> bool:
    """Whether most of the parameters are whole over an axis."""
    sizes = [math.prod(leaf.shape) for leaf in params]
    whole = sum(size for size, spec in zip(sizes, stored, strict=True) if axis not in axes_in(spec))
    return 2 * whole > sum(sizes)


def mixes(spec: Spec, axes: Sequence[str]) -> bool:
    """Whether a dimension is cut over some of `axes` and over others."""
    return any(0 < len(set(axes).intersection(one)) < len(one) for one in map(axes_of, spec))


def flat_specs(plan: Decision, tree: Any, kind: str = "params") -> tuple[Spec, ...]:
    """Return the spec of each leaf of a tree of a `kind`, of the parameters' ``moments`` too."""
    found = arrays.specs_of_moments(plan, tree) if kind == "moments" else arrays.specs(plan, tree, kind)
    leaves = jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return tuple(tuple(one) for one in leaves)
