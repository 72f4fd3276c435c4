"""Convolutions in groups, whose sums over rows each device takes of its own.

XLA's partitioner gives other numbers for one whose batch is in groups, as the gradient of the filters of any
convolution in groups is, where rows are cut over some axes of the mesh and others cut nothing of it: seen in
jaxlib 0.10.2 and 0.12.0. There such sums are taken by hand; the rest is left to XLA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from ..plans.specs import axes_in, by_dimension, cut_into, spec_of
from .meshes import by_device


def convolved_in_groups(
    eqn: core.JaxprEqn,
    mesh: Mesh | AbstractMesh,
    of_ins: Sequence[PartitionSpec],
    *,
    widens: bool = False,
) -> Callable[[Any, Any], Any] | None:
    """Return what convolves as `eqn` does, of operands that lie as `of_ins`; None where XLA does it right.

    Sums over devices are in float32 at least if it `widens`.
    """
    p = eqn.params
    if eqn.primitive.name != "conv_general_dilated" or p["feature_group_count"] * p["batch_group_count"] == 1:
        return None
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {axis for axis, kind in kinds if kind != AxisType.Manual and mesh.shape[axis] > 1}
    lies = [set(axes_in(tuple(spec))) & free for spec in of_ins]
    learns = all(jnp.issubdtype(atom.aval.dtype, jnp.inexact) for atom in eqn.invars)  # type: ignore[union-attr]
    if not lies[0] or lies[0] == free or not learns:
        return None
    one = _InGroups(eqn, mesh, of_ins, widens)
    return one.summed if p["batch_group_count"] > 1 else one.learnt


class _InGroups:
    """See `convolved_in_groups`."""

    def __init__(
        self, eqn: core.JaxprEqn, mesh: Mesh | AbstractMesh, of_ins: Sequence[PartitionSpec], widens: bool
    ) -> None:
        self._eqn, self._mesh, self._widens = eqn, mesh, widens
        avals: list[Any] = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
        self._ranks = [aval.ndim for aval in avals]
        self._filters = avals[1]
        self._of_x, self._of_filters = (
            by_dimension(tuple(spec), rank) for spec, rank in zip(of_ins, self._ranks, strict=False)
        )
        self._numbers = eqn.params["dimension_numbers"]

    def learnt(self, x: Any, filters: Any) -> Any:
        """Return the convolution of `x`; each device sums its filters' gradient over its own rows."""
        numbers, groups = self._numbers, self._eqn.params["feature_group_count"]
        (row, channel, *_), (out_row, out_channel, *_) = numbers.lhs_spec, numbers.out_spec
        rows, cut = self._of_x[row], self._of_x[channel]
        if cut != self._of_filters[numbers.rhs_spec[0]] or groups % cut_into(cut, self._mesh.shape):
            cut = ()
        parts = cut_into(cut, self._mesh.shape)
        of_x = self._spec(0, {row: rows, channel: cut})
        of_gradient = self._spec(2, {out_row: rows, out_channel: cut})
        of_filters = self._spec(1, {numbers.rhs_spec[0]: cut})
        shape = list(self._filters.shape)
        shape[numbers.rhs_spec[0]] //= parts
        like = jax.ShapeDtypeStruct(tuple(shape), self._filters.dtype)

        def learn(x: Any, gradient: Any) -> Any:
            def own(filters: Any) -> Any:
                return self._bind(x, filters, feature_group_count=groups // parts)

            return self._sum(jax.linear_transpose(own, like)(gradient)[0], rows)

        @jax.custom_vjp
        def run(x: Any, filters: Any) -> Any:
            return self._bind(x, filters)

        def backward(kept: tuple[Any, Any], gradient: Any) -> tuple[Any, Any]:
            x, filters = kept
            (of_inputs,) = jax.linear_transpose(lambda x: self._bind(x, filters), x)(gradient)
            return of_inputs, by_device(learn, self._mesh, (of_x, of_gradient), of_filters)(x, gradient)

        run.defvjp(lambda x, filters: (run(x, filters), (x, filters)), backward)
        return run(x, filters)

    def summed(self, x: Any, filters: Any) -> Any:
        """Return the convolution of a batch in groups, whose contracted rows devices have as they are cut."""
        channel, own = self._numbers.lhs_spec[1], self._numbers.rhs_spec[1]
        cut = self._of_x[channel]
        in_specs = self._spec(0, {channel: cut}), self._spec(1, {own: cut})

        def run(x: Any, filters: Any) -> Any:
            return self._sum(self._bind(x, filters), cut)

        return by_device(run, self._mesh, in_specs, PartitionSpec())(x, filters)

    def _bind(self, x: Any, filters: Any, **changed: Any) -> Any:
        return self._eqn.primitive.bind(x, filters, **{**self._eqn.params, **changed})

    def _sum(self, value: Any, axes: tuple[str, ...]) -> Any:
        if not axes:
            return value
        wide = value.astype(jnp.promote_types(value.dtype, jnp.float32)) if self._widens else value
        return jax.lax.psum(wide, axes).astype(value.dtype)

    def _spec(self, which: int, axes: dict[int, tuple[str, ...]]) -> PartitionSpec:
        return PartitionSpec(*spec_of(axes.get(n, ()) for n in range(self._ranks[which])))
