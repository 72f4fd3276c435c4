"""What is picked along a dimension, a place for each row, where XLA cannot look it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..plans.specs import by_dimension
from .meshes import constraint

_Mode = jax.lax.GatherScatterMode


def picked(
    eqn: core.JaxprEqn, mesh: Mesh | AbstractMesh, spec: PartitionSpec
) -> Callable[[Any, Any], Any] | None:
    """Return what looks up as `eqn` does in an array that lies as `spec` says, None where XLA may do so.

    Within a region in which some axes are manual, XLA ends the process on a look-up with rows of its own in
    an array that is cut over one automatic axis along what is looked up and over another elsewhere: logits
    whose vocabulary lies over `tensor` and whose sequence over `context`. Where one place is picked, every
    place is compared with it and what is not picked is left out of a sum, of which each device has a part;
    what is found, and its gradient, are the same to the bit. Elsewhere the array is gathered before.
    """
    if eqn.primitive.name != "gather":
        return None
    array: Any = eqn.invars[0].aval
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    along = [n for n in map(int, numbers.start_index_map) if sizes[n] < array.shape[n]]
    cut = by_dimension(tuple(spec), array.ndim)
    looked_in = [n for n in along if cut[n]]
    if not numbers.operand_batching_dims or not looked_in or sum(map(bool, cut)) < 2:
        return None
    if len(along) == 1 and sizes[along[0]] == 1 and jnp.issubdtype(array.dtype, jnp.number):
        # An index of a dimension that is read whole counts for nothing where it is clipped.
        alone, mode = len(numbers.start_index_map) == 1, eqn.params["mode"]
        if mode in (_Mode.CLIP, _Mode.PROMISE_IN_BOUNDS) or (alone and mode == _Mode.FILL_OR_DROP):
            return _Picks(eqn, along[0]).read
    rest = [None if n in along else axes or None for n, axes in enumerate(cut)]
    whole = NamedSharding(mesh, PartitionSpec(*rest))

    def gathered(array: Any, places: Any) -> Any:
        params = eqn.primitive.get_bind_params(eqn.params)
        return eqn.primitive.bind(constraint(mesh)(array, whole), places, **params)

    return gathered


class _Picks:
    """What `eqn` picks `along` a dimension of an array, by comparing; see `picked`."""

    def __init__(self, eqn: core.JaxprEqn, along: int) -> None:
        numbers, params = eqn.params["dimension_numbers"], eqn.params
        self._mode, self._fill, self._along = params["mode"], params["fill_value"], along
        self._number = list(map(int, numbers.start_index_map)).index(along)
        rows = list(map(int, numbers.operand_batching_dims))
        shared = list(map(int, numbers.start_indices_batching_dims))
        offsets, collapsed = [*map(int, numbers.offset_dims)], [*map(int, numbers.collapsed_slice_dims)]
        array, result = (atom.aval for atom in (eqn.invars[0], eqn.outvars[0]))
        self._rank: int = result.ndim  # type: ignore[union-attr]
        others = [n for n in range(array.ndim) if n not in rows and n not in collapsed]  # type: ignore[union-attr]
        of_places = [n for n in range(self._rank) if n not in offsets]
        # Where the array's dimensions are in the result; what is picked along is put last, and summed.
        self._laid = dict(zip(others, offsets, strict=True))
        self._laid.update((row, of_places[n]) for row, n in zip(rows, shared, strict=True))
        self._laid[along] = self._rank
        self._offsets = offsets

    def read(self, array: Any, places: Any) -> Any:
        """Return what `places` ``[..., indices]`` name of `array`."""
        whole, wanted = array.shape[self._along], places[..., self._number]
        if self._mode == _Mode.CLIP:
            wanted = jnp.clip(wanted, 0, whole - 1)
        order = sorted(self._laid, key=self._laid.__getitem__)
        there = set(self._laid.values())
        array = jax.lax.expand_dims(array.transpose(order), [n for n in range(self._rank) if n not in there])
        wanted = jax.lax.expand_dims(wanted, (*self._offsets, self._rank))
        counted = jax.lax.broadcasted_iota(wanted.dtype, (*(1,) * self._rank, whole), self._rank)
        found = jnp.where(counted == wanted, array, jnp.zeros((), array.dtype)).sum(-1, dtype=array.dtype)
        if self._mode != _Mode.FILL_OR_DROP:
            return found
        inside = ((wanted >= 0) & (wanted < whole))[..., 0]
        return jnp.where(inside, found, jnp.asarray(self._filling(array.dtype), array.dtype))

    def _filling(self, dtype: Any) -> Any:
        """Return what a place outside gives, as `jax.lax.gather` fills it."""
        if self._fill is not None:
            return self._fill
        if jnp.issubdtype(dtype, jnp.inexact):
            return jnp.nan
        limits = jnp.iinfo(dtype)
        return limits.min if jnp.issubdtype(dtype, jnp.signedinteger) else limits.max
