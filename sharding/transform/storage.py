"""Parameters on the way from where they are stored to their use, and gradients on the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..plans.specs import axes_in, by_dimension, cut_into, only, without
from ..program.jaxpr import closed, run
from ..program.primitives import Trait, primitives
from ..program.program import Dims
from .gather import ByHand, Scattering, StoredParameter, gathered, sums_of
from .meshes import constraint

_CHECKPOINTS = primitives(Trait.CHECKPOINT)


class Storage:
    """Brings stored parameters to their use on `mesh`, where `spec_of` says how an array of some dims lies.

    `scattering` says over which axes gradients go in steps, `reduces_cast` whether a gradient's sum is
    reduced in the smaller type it is cast to (`xla.compiler.Compiler`); the axes of `by_hand` are manual.
    """

    def __init__(
        self,
        mesh: Mesh | AbstractMesh,
        spec_of: Callable[[Dims, tuple[int, ...]], PartitionSpec],
        scattering: Scattering,
        by_hand: ByHand,
        reduces_cast: bool,
    ) -> None:
        self._mesh, self._spec, self._scattering = mesh, spec_of, scattering
        self._by_hand, self._reduces_cast = by_hand, reduces_cast

    def used(self, value: StoredParameter, dims: Dims) -> PartitionSpec:
        """Return how a stored parameter lies where it is computed with."""
        held = by_dimension(only(value.spec, self._by_hand.axes), value.value.ndim)
        rows = zip(value.value.shape, held, strict=True)
        return self._spec(dims, tuple(size * cut_into(axes, self._mesh.shape) for size, axes in rows))

    def gather(self, value: StoredParameter, dims: Dims, summed: bool = False) -> Any:
        """Return a parameter as it is computed with; `summed` if a loop adds its gradient up."""
        used, reduced = self.used(value, dims), self._by_hand.rest(value.reduced)
        if not any((used, axes_in(value.spec), reduced)):
            return value.value
        sharding = NamedSharding(self._mesh, used)
        if not jnp.issubdtype(value.value.dtype, jnp.inexact):
            return constraint(self._mesh)(self._by_hand.gather(value.value, value.spec), sharding)
        shardings = self._shardings(used, reduced, summed)
        return gathered(value.value, sharding, shardings, self._by_hand, value.spec)

    def cast_once(self, value: StoredParameter, dims: Dims, dtype: Any) -> tuple[Any, Any]:
        """Return a parameter cast and then gathered, and the array that its gradient is summed in."""
        used, reduced = self.used(value, dims), self._by_hand.rest(value.reduced)
        shardings = self._shardings(used, reduced, summed=True)
        # The barrier keeps a compiler from casting what has travelled.
        cast = jax.lax.optimization_barrier(jax.lax.stop_gradient(value.value).astype(dtype))
        cast = self._by_hand.gather(cast, value.spec)
        cast = constraint(self._mesh)(cast, NamedSharding(self._mesh, used))
        travels = dtype if self._reduces_cast else None
        return cast, sums_of(value.value, shardings, travels, self._by_hand, value.spec)

    def _shardings(self, used: PartitionSpec, reduced: PartitionSpec, summed: bool) -> list[NamedSharding]:
        """Return where a gradient is brought, one after the other.

        A loop's sum lies as the parameter is used at first: asked for a part of it, XLA would reduce what
        each turn adds, to all devices if it has no collective for less.
        """
        steps = self._scattering.shardings(used, reduced)
        first = NamedSharding(self._mesh, used)
        return [first, *steps] if summed and steps[0] != first else steps

    def stacked(self, eqn: core.JaxprEqn, inputs: Sequence[StoredParameter]) -> StoredParameter:
        """Return parameters stacked, stored as most of them are; so are their gradients before they part."""
        stored = Counter((value.spec, value.reduced) for value in inputs)
        (spec, reduced), _ = stored.most_common(1)[0]
        by_hand = self._by_hand
        if any(only(value.spec, by_hand.axes) != only(spec, by_hand.axes) for value in inputs):
            values = [self._whole(value) for value in inputs]
            spec, reduced = without(spec, by_hand.axes), without(reduced, by_hand.axes)
        else:
            values = [value.value for value in inputs]
        spec, reduced = (None, *spec), (None, *reduced)
        whole = run(eqn, values)[0]
        if any(axes_in(by_hand.rest(one)) for one in (spec, reduced)):
            used, goal = (NamedSharding(self._mesh, by_hand.rest(one)) for one in (spec, reduced))
            whole = gathered(whole, used, [goal])
        return StoredParameter(whole, spec, reduced)

    def _whole(self, value: StoredParameter) -> Any:
        """Return a parameter that is whole over what is done by hand, stored otherwise."""
        used, goal = (
            NamedSharding(self._mesh, self._by_hand.rest(one)) for one in (value.spec, value.reduced)
        )
        return gathered(value.value, used, [goal], self._by_hand, value.spec)


def cast_of_uses(jaxpr: core.Jaxpr, index: int) -> Any:
    """Return the smaller type that all uses of an argument cast it to, or None."""
    variable = jaxpr.invars[index]
    found = set()
    for eqn in jaxpr.eqns:
        for place in (n for n, atom in enumerate(eqn.invars) if atom is variable):
            name = eqn.primitive.name
            if name == "convert_element_type":
                found.add(eqn.params["new_dtype"])
            elif name == "jit" or name in _CHECKPOINTS:
                found.add(cast_of_uses(closed(eqn.params["jaxpr"]).jaxpr, place))
            else:
                found.add(None)
    cast = found.pop() if len(found) == 1 and variable not in jaxpr.outvars else None
    own: Any = variable.aval
    return cast if cast is not None and cast.itemsize < own.dtype.itemsize else None
