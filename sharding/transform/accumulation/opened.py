"""A manual region as a program over the arrays of all devices: each axis a dimension that `jax.vmap` names.

Sums over devices are sums over dimensions then, which may be completed between passes over the parts. XLA
lays the program out and makes the exchanges, since it is no manual region any more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ...plans.specs import axes_in, axes_of
from ...program.jaxpr import call_body, context_of, run
from .values import Array

# Derivatives that are written for what one device does, layouts, kernels, draws that mapping changes.
_OF_A_DEVICE = frozenset(
    {
        "custom_vjp_call",
        "ffi_call",
        "pallas_call",
        "rng_bit_generator",
        "shard_map",
        "sharding_constraint",
    }
)
_CALLS = frozenset({"jit", "pjit"})


def opened(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Return the program of a region, from its arrays to its results; None where it has no other form."""
    body = call_body(eqn)
    if body is None or any(one.primitive.name in _OF_A_DEVICE or _draws(one) for one in _equations(body)):
        return None
    avals: list[Any] = [var.aval for var in eqn.invars]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    try:
        with context_of(eqn):
            found = jax.make_jaxpr(functools.partial(_run, eqn, _outside(body, eqn.ctx)))(*shapes)
    # JAX maps no equation that checks over which devices its operands differ, and says so in several ways.
    except (AssertionError, ValueError, TypeError, LookupError, NameError, NotImplementedError):
        return None
    return None if any(_within(one) for one in _equations(found)) else found


def _equations(closed: core.ClosedJaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in closed.jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if isinstance(inner, core.ClosedJaxpr):
                yield from _equations(inner)
            elif isinstance(inner, core.Jaxpr):
                yield from _equations(core.ClosedJaxpr(inner, ()))


def _outside(closed: core.ClosedJaxpr, context: Any) -> core.ClosedJaxpr:
    """Return a program whose equations have another `context`, which says in what mesh they are run."""

    def moved(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(moved, value))
        if isinstance(value, core.ClosedJaxpr):
            return _outside(value, context)
        if isinstance(value, core.Jaxpr):
            return _outside(core.ClosedJaxpr(value, ()), context).jaxpr
        if isinstance(value, NamedSharding) and AxisType.Manual in value.mesh.axis_types:
            return None
        return value

    eqns = [
        one.replace(ctx=context, params={name: moved(value) for name, value in one.params.items()})
        for one in closed.jaxpr.eqns
    ]
    return core.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)


def _within(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` was traced within a manual region, as what a loop in one runs was."""
    return AxisType.Manual in eqn.ctx.cur_abstract_mesh.axis_types


def _draws(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` draws numbers that would be others if it were mapped over; threefry's are a key's own."""
    if eqn.primitive.name != "random_bits":
        return False
    key: Any = eqn.invars[0].aval
    return "fry" not in str(key.dtype)


def _run(eqn: core.JaxprEqn, body: core.ClosedJaxpr, *arrays: Array) -> list[Array]:
    mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
    axes = [axis for axis in mesh.axis_names if axis in manual]
    takes, gives = eqn.params["in_specs"], eqn.params["out_specs"]
    mapped: Callable[..., Any] = functools.partial(_walked, body)
    for axis in reversed(axes):
        mapped = jax.vmap(
            mapped,
            in_axes=tuple(0 if axis in axes_in(spec) else None for spec in takes),
            out_axes=[0 if axis in axes_in(spec) else None for spec in gives],
            axis_name=axis,
            axis_size=mesh.shape[axis],
        )
    found = mapped(*[_apart(x, spec, axes, mesh.shape) for x, spec in zip(arrays, takes, strict=True)])
    return [_together(x, spec, axes, mesh.shape) for x, spec in zip(found, gives, strict=True)]


def _walked(closed: core.ClosedJaxpr, *arrays: Array) -> list[Array]:
    """Run a region's program where its axes are those of `jax.vmap`, over which nothing is checked."""
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    known |= zip(closed.jaxpr.invars, arrays, strict=True)

    def read(atom: Any) -> Any:
        # A number knows in what mesh it was written.
        if not isinstance(atom, core.Literal):
            return known[atom]
        aval: Any = atom.aval
        return np.asarray(atom.val, aval.dtype)

    outside = jax.sharding.get_abstract_mesh()
    for eqn in closed.jaxpr.eqns:
        with context_of(eqn), jax.sharding.use_abstract_mesh(outside):
            known |= zip(eqn.outvars, _again(eqn, [read(atom) for atom in eqn.invars]), strict=True)
    return [read(atom) for atom in closed.jaxpr.outvars]


def _again(eqn: core.JaxprEqn, ins: list[Array]) -> Sequence[Array]:
    name, params, body = eqn.primitive.name, eqn.params, call_body(eqn)
    if name == "psum_invariant":
        return [lax.psum(one, params["axes"]) for one in ins]
    if name in ("pvary", "pcast"):
        return ins
    if name == "all_gather_invariant":
        at, tiled = params["all_gather_dimension"], params["tiled"]
        return [lax.all_gather(one, params["axis_name"], axis=at, tiled=tiled) for one in ins]
    if name in _CALLS and body is not None:
        return _walked(body, *ins)
    return run(eqn, ins)


def _apart(array: Array, spec: PartitionSpec, axes: Sequence[str], sizes: Any) -> Array:
    """Return an array with the axes that cut it as its first dimensions, in the order of `axes`."""
    shape, places = list[int](), dict[str, int]()
    for dim, size in enumerate(array.shape):
        names = _axes(spec, dim)
        places |= {name: len(shape) + n for n, name in enumerate(names)}
        shape += [sizes[name] for name in names]
        shape.append(size // math.prod(sizes[name] for name in names))
    first = [places[axis] for axis in axes if axis in places]
    return array.reshape(shape).transpose([*first, *(n for n in range(len(shape)) if n not in first)])


def _together(array: Array, spec: PartitionSpec, axes: Sequence[str], sizes: Any) -> Array:
    """Undo `_apart`."""
    first = [axis for axis in axes if axis in axes_in(spec)]
    order, shape = list[int](), list[int]()
    for dim, size in enumerate(array.shape[len(first) :]):
        names = _axes(spec, dim)
        order += [*(first.index(name) for name in names), len(first) + dim]
        shape.append(size * math.prod(sizes[name] for name in names))
    return array.transpose(order).reshape(shape)


def _axes(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    return axes_of(spec[dim]) if dim < len(spec) else ()
