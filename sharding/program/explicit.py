"""Losses written for a mesh of explicit axes, as programs that say nothing of how their arrays lie.

Under such a mesh the types of arrays say over which axes they are cut, and a loss may say it itself
(``reshard``, ``auto_axes``, an ``out_sharding``). It says nothing of the values, and a plan lays them out by
itself on a mesh of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..errors import UserError
from .around import NO_MESH, under
from .jaxpr import Traced, closed, context_of, is_array, run, run_around, shapes_of
from .lines import line_of
from .primitives import Trait, primitives
from .repeats.keys import Keys

# What gives its operand, lying otherwise or typed otherwise.
_SAME = frozenset({"reshard", "mesh_cast"})
# What is run again with another program in place of its own.
_HOLDING = primitives(Trait.CHECKPOINT) | {"jit", "pjit", "closed_call", "scan", "while", "cond"}
# The mesh that a jitted call has where none is set.
_NO_DEVICES = Mesh(np.empty((), dtype=object), ())
# Parameters that say how a result lies.
_LAYOUTS = frozenset({"sharding", "out_sharding"})


def without_layouts(traced: Traced, mesh: Any) -> Traced:
    """Return what was traced under `mesh` as it is under none; itself where `mesh` is None."""
    if mesh is None:
        return traced
    jaxpr = _Untyped().program(traced.jaxpr)
    return dataclasses.replace(traced, jaxpr=jaxpr, result=shapes_of(traced.result))


class _Untyped:
    """Traces programs again under no mesh, each once."""

    def __init__(self) -> None:
        # The programs too, so that their ids stay their own.
        self._known: dict[int, tuple[Any, core.ClosedJaxpr]] = {}
        self._keys = Keys()
        self._own: dict[int, Callable[..., Any]] = {}

    def program(self, program: Any) -> core.ClosedJaxpr:
        whole = closed(program)
        if id(program) not in self._known:
            self._known[id(program)] = program, self._traced(whole)
        return self._known[id(program)][1]

    def _traced(self, program: core.ClosedJaxpr) -> core.ClosedJaxpr:
        jaxpr, count = program.jaxpr, len(program.consts)
        shapes = [_shape(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)]
        with under(NO_MESH):
            made = jax.make_jaxpr(lambda *arrays: self._run(jaxpr, arrays))(*shapes).jaxpr
        parts = {"constvars": made.invars[:count], "invars": made.invars[count:]}
        debug = made.debug_info.with_unknown_names()
        return core.ClosedJaxpr(made.replace(**parts, debug_info=debug), [*map(_relabelled, program.consts)])

    def _run(self, jaxpr: core.Jaxpr, arrays: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), arrays, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            around = jax.sharding.get_abstract_mesh()
            with context_of(eqn), under(around):
                outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        if name in _SAME:
            return inputs
        if name == "shard_map":
            return self._region(eqn, inputs)
        if name in _OWN_RULES:
            return self._with_own_rule(eqn)(*inputs)
        holds = name in _HOLDING
        params = {key: self._param(key, value, holds) for key, value in eqn.params.items()}
        return run(eqn.replace(params=params), inputs)

    def _param(self, key: str, value: Any, holds: bool) -> Any:
        if key in _LAYOUTS and isinstance(value, NamedSharding):
            return None
        if not holds:
            return value
        if isinstance(value, core.ClosedJaxpr):
            return self.program(value)
        if isinstance(value, core.Jaxpr):
            return self.program(value).jaxpr
        if isinstance(value, Mesh):
            return _NO_DEVICES
        if type(value) is tuple:
            return tuple(self._param(key, one, holds) for one in value)
        return value

    def _region(self, eqn: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
        """Run a manual region on its mesh with automatic axes; within it, types name none of them."""
        mesh = eqn.params["mesh"]
        if left := [axis for axis in mesh.axis_names if axis not in eqn.params["newly_manual_axes"]]:
            raise UserError(
                f"the loss's jax.shard_map at {line_of(eqn)} leaves out {', '.join(left)} of its mesh, whose "
                "axes are explicit: give it all, or a mesh of automatic ones (axis_types=(AxisType.Auto, …))"
            )
        types = (AxisType.Auto,) * len(mesh.axis_names)
        own = (
            Mesh(mesh.devices, mesh.axis_names, axis_types=types)
            if isinstance(mesh, Mesh)
            else mesh.update(axis_types=types)
        )
        region = eqn.replace(params={**eqn.params, "mesh": own})
        body = core.jaxpr_as_fun(_unsaid(closed(eqn.params["jaxpr"])))
        return run_around(region, inputs, lambda arrays: body(*arrays))

    def _with_own_rule(self, eqn: core.JaxprEqn) -> Callable[..., Any]:
        """Return a function with a rule of its own, one for all calls that are alike."""
        key = self._keys.equation(eqn).key
        if key not in self._own:
            own = _OWN_RULES[eqn.primitive.name]
            self._own[key] = own(self, eqn)
        return self._own[key]

    def own_derivative(self, eqn: core.JaxprEqn) -> Callable[..., Any]:
        """Return a function whose derivative is written for it, that of the same rule."""
        avals: list[Any] = [atom.aval for atom in eqn.invars]
        floats = [_is_float(aval) for aval in avals]
        learns = [_is_float(var.aval) for var in eqn.outvars]

        def derived(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
            filled = _filled(floats, tangents, avals)
            found, moved = jax.jvp(lambda *own: list(run(eqn, own)), tuple(primals), tuple(filled))
            return found, _kept(learns, moved)

        body = self.program(eqn.params["call_jaxpr"])
        # When it is asked for: what it gives may be had by the function itself.
        rule = functools.cache(lambda: self._rule(eqn, derived, avals, _kept(floats, avals)))

        @jax.custom_jvp
        def call(*arrays: Any) -> Any:
            return core.jaxpr_as_fun(body)(*arrays)

        @call.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            found = core.jaxpr_as_fun(rule())(*primals, *_kept(floats, tangents))
            outs = found[: len(learns)]
            return outs, _filled(learns, found[len(learns) :], outs)

        return call

    def own_gradient(self, eqn: core.JaxprEqn) -> Callable[..., Any]:
        """Return a function whose gradient is written for it, that of the same rule.

        What it closed over is among its operands, and has none.
        """
        avals: list[Any] = [atom.aval for atom in eqn.invars]
        outs: list[Any] = [var.aval for var in eqn.outvars]
        count = eqn.params.get("num_consts", 0)
        floats, learns = [_is_float(aval) for aval in avals[count:]], [_is_float(aval) for aval in outs]
        pulls: list[Any] = []

        def forward(*arrays: Any) -> Any:
            found, pull = jax.vjp(lambda *own: list(run(eqn, [*arrays[:count], *own])), *arrays[count:])
            kept, structure = jax.tree.flatten(pull)
            pulls.append(structure)
            return found, kept

        def backward(kept: Any, cotangents: Any) -> Any:
            return _kept(floats, jax.tree.unflatten(pulls[0], kept)(_filled(learns, cotangents, outs)))

        @functools.cache
        def rules() -> tuple[core.ClosedJaxpr, core.ClosedJaxpr]:
            with eqn.ctx.manager:
                typed = jax.make_jaxpr(forward)(*avals)
            kept = typed.out_avals[len(outs) :]
            return self.program(typed), self._rule(eqn, backward, kept, _kept(learns, outs))

        body = self.program(eqn.params["call_jaxpr"])

        @jax.custom_vjp
        def call(*arrays: Any) -> Any:
            return core.jaxpr_as_fun(body)(*arrays)

        def fwd(*arrays: Any) -> Any:
            found = core.jaxpr_as_fun(rules()[0])(*arrays)
            return found[: len(outs)], found[len(outs) :]

        def bwd(kept: Any, cotangents: Any) -> Any:
            gradients = iter(core.jaxpr_as_fun(rules()[1])(*kept, *_kept(learns, cotangents)))
            return (*[None] * count, *(next(gradients) if one else None for one in floats))

        call.defvjp(fwd, bwd)
        return call

    def _rule(self, eqn: core.JaxprEqn, function: Callable[..., Any], *args: Any) -> core.ClosedJaxpr:
        with eqn.ctx.manager:
            traced = jax.make_jaxpr(function)(*args)
        return self.program(traced)


_OWN_RULES = {"custom_jvp_call": _Untyped.own_derivative, "custom_vjp_call": _Untyped.own_gradient}


def _unsaid(program: Any) -> Any:
    """Return what devices run by themselves, whose results say nothing of how they lie."""

    def param(key: str, value: Any) -> Any:
        if key in _LAYOUTS and isinstance(value, NamedSharding):
            return None
        if type(value) is tuple:
            return tuple(param(key, one) for one in value)
        return _unsaid(value) if isinstance(value, core.Jaxpr | core.ClosedJaxpr) else value

    if not isinstance(program, core.Jaxpr):
        return core.ClosedJaxpr(_unsaid(program.jaxpr), program.consts)
    eqns = [one.replace(params={k: param(k, v) for k, v in one.params.items()}) for one in program.eqns]
    return program.replace(eqns=eqns)


def _is_float(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _kept(which: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    return [value for one, value in zip(which, values, strict=True) if one]


def _filled(which: Sequence[bool], values: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Return `values` where `which` says, and the tangents that integers have elsewhere."""
    given = iter(values)
    return [
        next(given) if one else np.zeros(aval.shape, jax.dtypes.float0)
        for one, aval in zip(which, like, strict=True)
    ]


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def _relabelled(const: Any) -> Any:
    """Return an array that a loss reads from outside, which lies where it lay, typed as under no mesh."""
    sharding = getattr(const, "sharding", None)
    if not is_array(const) or not isinstance(sharding, NamedSharding):
        return const
    assert isinstance(sharding.mesh, Mesh)
    types = (AxisType.Auto,) * len(sharding.mesh.axis_names)
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names, axis_types=types)
    with jax.ensure_compile_time_eval():
        return jax.device_put(const, NamedSharding(mesh, PartitionSpec(*sharding.spec)))
