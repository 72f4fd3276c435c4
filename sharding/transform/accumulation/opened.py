"""A manual region as a program over the arrays of all devices: each axis a dimension that `jax.vmap` names.

Sums over devices are sums over dimensions then, which may be completed between passes over the parts. XLA
lays the program out and makes the exchanges, since it is no manual region any more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ...plans.specs import axes_in, axes_of
from ...program.jaxpr import branches, call_body, context_of, run, run_around, while_parts
from ...program.primitives import Trait, primitives
from .derivatives import (
    EXCHANGES,
    Derivative,
    Gradient,
    is_linear,
    written_derivative,
    written_gradient,
)
from .values import Array

# Layouts, kernels, draws that mapping changes.
_OF_A_DEVICE = frozenset(
    {
        "ffi_call",
        "pallas_call",
        "rng_bit_generator",
        "shard_map",
        "sharding_constraint",
    }
)
_CALLS = frozenset({"jit", "pjit"})
_BODIES = primitives(Trait.CHECKPOINT) | {"scan"}

# The rules of functions with derivatives of their own, by the number (`id`) of their equation.
_Rules = Mapping[int, Derivative | Gradient]


def opened(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Return the program of a region, from its arrays to its results; None where it has no other form."""
    body = call_body(eqn)
    if body is None or any(one.primitive.name in _OF_A_DEVICE or _draws(one) for one in _equations(body)):
        return None
    rules = _rules(body, eqn.ctx)
    if rules is None:
        return None
    avals: list[Any] = [var.aval for var in eqn.invars]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    try:
        with context_of(eqn):
            found = jax.make_jaxpr(functools.partial(_run, eqn, rules, _outside(body, eqn.ctx)))(*shapes)
    # JAX maps no equation that checks over which devices its operands differ, and says so in several ways.
    except (AssertionError, ValueError, TypeError, LookupError, NameError, NotImplementedError):
        return None
    return None if any(_within(one) for one in _equations(found)) else found


def _rules(body: core.ClosedJaxpr, context: Any) -> _Rules | None:
    """Return the rules of what has a derivative of its own in a region; None where one has no other form.

    A gradient that is written for what one device does is that of all devices if it is linear in what comes
    back, of which each has a share, and exchanges nothing.
    """
    found: dict[int, Derivative | Gradient] = {}
    for one in _equations(body):
        if one.primitive.name == "custom_jvp_call":
            made = written_derivative(one)
            found[id(one)] = made._replace(rule=_outside(made.rule, context))
        elif one.primitive.name == "custom_vjp_call":
            made = written_gradient(one)
            inner = [*_equations(made.ahead), *_equations(made.back)]
            if not is_linear(made) or any(each.primitive.name in EXCHANGES for each in inner):
                return None
            ahead, back = _outside(made.ahead, context), _outside(made.back, context)
            found[id(one)] = made._replace(ahead=ahead, back=back)
    return found


def _equations(closed: core.ClosedJaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in closed.jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if isinstance(inner, core.ClosedJaxpr):
                yield from _equations(inner)
            elif isinstance(inner, core.Jaxpr):
                yield from _equations(core.ClosedJaxpr(inner, ()))


def _outside(closed: core.ClosedJaxpr, context: Any) -> core.ClosedJaxpr:
    """Return a program whose equations have another `context`, which says in what mesh they are run.

    Those with a derivative of their own stay as they are, since it is found by them.
    """

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
        one
        if one.primitive.name in ("custom_jvp_call", "custom_vjp_call")
        else one.replace(ctx=context, params={name: moved(value) for name, value in one.params.items()})
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


def _run(eqn: core.JaxprEqn, rules: _Rules, body: core.ClosedJaxpr, *arrays: Array) -> list[Array]:
    mesh, manual = eqn.params["mesh"], eqn.params["newly_manual_axes"]
    axes = [axis for axis in mesh.axis_names if axis in manual]
    takes, gives = eqn.params["in_specs"], eqn.params["out_specs"]
    mapped: Callable[..., Any] = functools.partial(_walked, rules, body)
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


def _walked(rules: _Rules, closed: core.ClosedJaxpr, *arrays: Array) -> list[Array]:
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
            known |= zip(eqn.outvars, _again(rules, eqn, [read(atom) for atom in eqn.invars]), strict=True)
    return [read(atom) for atom in closed.jaxpr.outvars]


def _again(rules: _Rules, eqn: core.JaxprEqn, ins: list[Array]) -> Sequence[Array]:
    name, params, body = eqn.primitive.name, eqn.params, call_body(eqn)
    if name == "psum_invariant":
        return [lax.psum(one, params["axes"]) for one in ins]
    if name in ("pvary", "pcast"):
        return ins
    if name == "all_gather_invariant":
        at, tiled = params["all_gather_dimension"], params["tiled"]
        return [lax.all_gather(one, params["axis_name"], axis=at, tiled=tiled) for one in ins]
    rule = rules.get(id(eqn))
    if rule is not None and body is not None:
        own = _moved(rules, rule, body) if isinstance(rule, Derivative) else _pulled(rules, rule, body)
        return own(*ins)
    if body is not None and name in _BODIES:
        return run_around(eqn, ins, lambda own: _walked(rules, body, *own))
    if body is not None and name in (*_CALLS, "custom_jvp_call", "custom_vjp_call"):
        return _walked(rules, body, *ins)
    if name == "cond":
        return lax.switch(ins[0], [functools.partial(_walked, rules, one) for one in branches(eqn)], *ins[1:])
    return _repeated(rules, eqn, ins) if name == "while" else run(eqn, ins)


def _repeated(rules: _Rules, eqn: core.JaxprEqn, ins: list[Array]) -> Sequence[Array]:
    parts = while_parts(eqn)
    tests, bodies = parts.num_cond_consts, parts.num_cond_consts + parts.num_body_consts
    return lax.while_loop(
        lambda state: _walked(rules, parts.cond, *ins[:tests], *state)[0],
        lambda state: _walked(rules, parts.body, *ins[tests:bodies], *state),
        ins[bodies:],
    )


def _moved(rules: _Rules, own: Derivative, body: core.ClosedJaxpr) -> Callable[..., list[Array]]:
    """Return the function `body` with the derivative `own`."""

    @jax.custom_jvp
    def call(*arrays: Array) -> list[Array]:
        return _walked(rules, body, *arrays)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        given = [one for one, learnt in zip(tangents, own.floats, strict=True) if learnt]
        found = _walked(rules, own.rule, *primals, *given)
        outs, moved = found[: len(own.learns)], iter(found[len(own.learns) :])
        pairs = zip(outs, own.learns, strict=True)
        return outs, [next(moved) if one else np.zeros(out.shape, jax.dtypes.float0) for out, one in pairs]

    return call


def _pulled(rules: _Rules, own: Gradient, body: core.ClosedJaxpr) -> Callable[..., list[Array]]:
    """Return the function `body` with the gradient `own`."""

    @jax.custom_vjp
    def call(*arrays: Array) -> list[Array]:
        return _walked(rules, body, *arrays)

    def forward(*arrays: Array) -> Any:
        found = _walked(rules, own.ahead, *arrays)
        return found[: len(own.learns)], found[len(own.learns) :]

    def backward(kept: Any, cotangents: Any) -> Any:
        given = [one for one, learnt in zip(cotangents, own.learns, strict=True) if learnt]
        found = iter(_walked(rules, own.back, *kept, *given))
        return tuple(next(found) if one else None for one in own.floats)

    call.defvjp(forward, backward)
    return call


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
