"""Parameters as they are stored: gathered where they are used, their gradients scattered back.

A parameter that is stored over more devices than it is computed with is gathered where it is used, and its
gradient scattered there, at once or axis by axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ..plans.specs import Spec, axes_of, by_dimension, only, without
from ..program.jaxpr import run
from .meshes import by_device, constraint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredParameter:
    """A parameter, or a layer's slice of one, as it is stored; `spec` says how. Gathered when used.

    `reduced` is the spec that its gradient is brought to.
    """

    value: Any
    spec: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    reduced: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    def row(self) -> StoredParameter:
        """Return a slice along the first dimension, which `value` is already, as it is stored."""
        return StoredParameter(self.value, self.spec[1:], self.reduced[1:])

    def passed(self, eqn: core.JaxprEqn) -> StoredParameter | None:
        """Return what a cast or a transposition of it gives, stored still; None for any other equation."""
        if eqn.primitive.name == "convert_element_type":
            return dataclasses.replace(self, value=run(eqn, [self.value])[0])
        if eqn.primitive.name != "transpose":
            return None
        order = eqn.params["permutation"]
        specs = (_permuted(self.spec, order), _permuted(self.reduced, order))
        return StoredParameter(run(eqn, [self.value])[0], *specs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByHand:
    """Gathers over `axes` of `mesh`, manual around what is traced, and scatters gradients over them.

    What other axes cut is made manual meanwhile: XLA would gather it for a collective that is not its own.
    With `widens` a gradient is scattered in float32 at least: XLA on a CPU cannot in less.
    """

    mesh: Mesh | AbstractMesh | None = None
    axes: tuple[str, ...] = ()
    widens: bool = False

    def gather(self, value: Any, spec: Spec) -> Any:
        """Return what `value`, which lies as `spec` says, is a device's part of."""

        def gather(value: Any) -> Any:
            for place, axes in self._cut(spec):
                value = jax.lax.all_gather(value, axes, axis=place, tiled=True)
            return value

        return self._by_device(gather, value, spec)

    def scatter(self, gradient: Any, spec: Spec) -> Any:
        """Return a device's part of the sum of `gradient` over the devices."""
        dtype = gradient.dtype
        wide = jnp.promote_types(dtype, jnp.float32) if self.widens else dtype

        def scatter(gradient: Any) -> Any:
            for place, axes in self._cut(spec):
                sent = gradient.astype(wide)
                gradient = jax.lax.psum_scatter(sent, axes, scatter_dimension=place, tiled=True)
            # XLA for TPUs ends with an internal error where it finds a narrow scatter that is widened and
            # summed over a loop's turns (`while_loop_all_reduce_code_motion`): the barrier hides it.
            return gradient if dtype.itemsize >= 4 else jax.lax.optimization_barrier(gradient.astype(dtype))

        return self._by_device(scatter, gradient, spec)

    def rest(self, spec: Any) -> PartitionSpec:
        """Return what of a spec is not done by hand."""
        return PartitionSpec(*without(tuple(spec), self.axes))

    def _by_device(self, function: Callable[[Any], Any], value: Any, spec: Spec) -> Any:
        if not self._cut(spec):
            return value
        assert self.mesh is not None
        rest = self.rest(spec)
        return by_device(function, self.mesh, (rest,), rest)(value)

    def _cut(self, spec: Spec) -> list[tuple[int, tuple[str, ...]]]:
        entries = enumerate(map(axes_of, only(tuple(spec), self.axes)))
        return [(place, axes) for place, axes in entries if axes]


# Where all is left to XLA.
NOTHING = ByHand()


def elementwise(
    eqn: core.JaxprEqn, inputs: Sequence[Any], mesh: Mesh | AbstractMesh, by_hand: ByHand
) -> StoredParameter | None:
    """Return what an equation makes of parameters and scalars, position by position, where they are stored.

    None if something else is among its inputs. So a moving average of parameters gathers nothing.
    """
    stored = [value for value in inputs if isinstance(value, StoredParameter)]
    if not stored or any(jnp.ndim(value) for value in inputs if not isinstance(value, StoredParameter)):
        return None
    # A number is one wherever it is stored.
    arrays = [value for value in stored if jnp.ndim(value.value)]
    like = (arrays or stored)[-1]
    if any(only(one.spec, by_hand.axes) != only(like.spec, by_hand.axes) for one in arrays):
        return None
    sharding = NamedSharding(mesh, by_hand.rest(like.spec))

    def lying(value: Any) -> Any:
        if not isinstance(value, StoredParameter):
            return value
        lies = value.spec == like.spec or not jnp.ndim(value.value)
        return value.value if lies else _brought(value.value, [sharding])

    (made,) = run(eqn, [lying(value) for value in inputs])
    return dataclasses.replace(like, value=made)


def gathered(
    value: Any,
    used: NamedSharding,
    reduced: Sequence[NamedSharding],
    by_hand: ByHand = NOTHING,
    stored: Spec = (),
) -> Any:
    """Bring a parameter, `stored` so, to where it is used; its gradient goes to `reduced`, one by one."""

    @jax.custom_vjp
    def gather(value: Any) -> Any:
        return constraint(used.mesh)(by_hand.gather(value, stored), used)

    def backward(_: None, gradient: Any) -> tuple[Any]:
        if by_hand.axes:
            return (_brought(by_hand.scatter(_brought(gradient, reduced[:1]), stored), reduced[1:]),)
        return (_brought(gradient, reduced),)

    gather.defvjp(lambda value: (gather(value), None), backward)
    return gather(value)


def sums_of(
    value: Any,
    reduced: Sequence[NamedSharding],
    travels: Any = None,
    by_hand: ByHand = NOTHING,
    stored: Spec = (),
) -> Any:
    """Return an array of zeros whose gradient becomes that of a stored parameter, brought to `reduced`.

    A loop that reads the parameter in a smaller type adds its gradient up there, in the parameter's own type
    (`learning`); it is brought in the type `travels`, if given.
    """

    @jax.custom_vjp
    def zeros(value: Any) -> Any:
        whole = jax.eval_shape(lambda value: by_hand.gather(value, stored), value)
        return constraint(reduced[0].mesh)(jnp.zeros(whole.shape, value.dtype), reduced[0])

    def backward(_: None, gradient: Any) -> tuple[Any]:
        sent = gradient if travels is None else gradient.astype(travels)
        return (_brought(by_hand.scatter(sent, stored), reduced).astype(gradient.dtype),)

    zeros.defvjp(lambda value: (zeros(value), None), backward)
    return zeros(value)


def learning(value: Any, sums: Any) -> Any:
    """Return `value`; its gradient is that of `sums` (`sums_of`), in the type of `sums`."""
    dtype = sums.dtype

    @jax.custom_vjp
    def learn(value: Any, sums: Any) -> Any:
        del sums
        return value

    learn.defvjp(
        lambda value, sums: (value, None),
        lambda _, gradient: (jnp.zeros_like(gradient), gradient.astype(dtype)),
    )
    return learn(value, sums)


def _brought(gradient: Any, shardings: Sequence[NamedSharding]) -> Any:
    for sharding in shardings:
        gradient = constraint(sharding.mesh)(gradient, sharding)
    return gradient


def _permuted(spec: tuple[Any, ...], order: Sequence[int]) -> tuple[Any, ...]:
    return tuple(spec[n] if n < len(spec) else None for n in order)


class Scattering:
    """Scatters gradients over the axes of `mesh`; over those in `steps`, in steps of their factors.

    The factors of an axis are those of its index, major first: after the first step a device has the part of
    the array that its index's major digit numbers, and scatters that over the next.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, steps: Mapping[str, Sequence[int]]) -> None:
        factors = {axis: tuple(steps.get(axis, (size,))) for axis, size in mesh.shape.items()}
        for axis, size in mesh.shape.items():
            if math.prod(factors[axis]) != size:
                raise ValueError(f"steps of {factors[axis]} are not {axis}={size}")
        self._mesh = mesh
        self._parts = {
            axis: [axis] if len(sizes) == 1 else [f"{axis}_{n}" for n in range(len(sizes))]
            for axis, sizes in factors.items()
        }
        sizes = {
            part: size
            for axis, parts in self._parts.items()
            for part, size in zip(parts, factors[axis], strict=True)
        }
        self._split = _reshaped(mesh, sizes) if len(sizes) > len(mesh.shape) else mesh

    def shardings(self, used: PartitionSpec, reduced: PartitionSpec) -> list[NamedSharding]:
        """Return the shardings to bring the gradient of an array to that is computed with as `used` says.

        The last is `reduced`. Without steps the first is where it was computed: asked for the stored sharding
        at once, XLA would move the activations.
        """
        last = NamedSharding(self._mesh, reduced)
        rank = max(len(used), len(reduced))
        before, after = by_dimension(tuple(used), rank), by_dimension(tuple(reduced), rank)
        gained = [tuple(axis for axis in b if axis not in a) for a, b in zip(before, after, strict=True)]
        count = max((len(self._parts[axis]) for axes in gained for axis in axes), default=1)
        if count == 1:
            return [NamedSharding(self._mesh, used), last]
        # Parts nest where the new axis comes after those that are there.
        if any(len(new) > 1 or a + new != b for a, new, b in zip(before, gained, after, strict=True)):
            return [NamedSharding(self._mesh, used), last]
        found = []
        for done in range(1, count):
            entries: list[Any] = [
                tuple(part for axis in a for part in self._parts[axis])
                + tuple(part for axis in axes for part in self._parts[axis][:done])
                for a, axes in zip(before, gained, strict=True)
            ]
            found.append(NamedSharding(self._split, PartitionSpec(*[entry or None for entry in entries])))
        return [*found, last]


def _reshaped(mesh: Mesh | AbstractMesh, sizes: Mapping[str, int]) -> Mesh | AbstractMesh:
    """Return `mesh` with its devices in the same order under other axes."""
    types = (AxisType.Auto,) * len(sizes)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), tuple(sizes), axis_types=types)
