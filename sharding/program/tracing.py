"""Trace a function and name its dimensions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from ..errors import UserError
from ..ops import cudnn
from ..paths import by_path, path_of
from . import dims as named
from .around import mesh_of_caller, under
from .explicit import without_layouts
from .jaxpr import Traced, call_body, without_references
from .labels import axis_names, names_of
from .lines import line_of
from .primitives import Trait, primitives
from .program import Argument, Program, Result, Unknown
from .recognise import recognised
from .resolve import Resolver
from .stacks import stacks_of
from .taken import taken_of
from .walk import Walk, shape_of

_CALLS = primitives(Trait.CALL)


def trace(
    fn: Callable[..., Any],
    *args: Any,
    names: Any = None,
    parameters: Sequence[int] = (0,),
    state: Sequence[int] = (),
    trained: Collection[str] | None = None,
    recognise: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> Program:
    """Trace `fn` on abstract `args` and find its named dimensions.

    Args:
        fn: any function that JAX can trace; usually ``loss(params, batch)``.
        args: pytrees of arrays, or of anything with a shape and dtype. Nothing is computed.
        names: the user's names of array dimensions, as a tree parallel to the first argument with a tuple
            of names (or None) for each array; or a dictionary from argument positions to such trees.
            Names only label what is found.
        parameters: which arguments are parameters.
        state: which arguments, that are no parameters, are a state; all others are data.
        trained: the paths of those of the first argument whose gradients are taken; all floats if not given.
        recognise: forms that are rewritten where they are found; see `recognise`.
        rows: names of the first dimensions of the data that lead with the batch.

    Raises:
        UserError: when names do not fit the arguments, or a form is not known.

    >>> w, x = jax.ShapeDtypeStruct((8, 4), "float32"), jax.ShapeDtypeStruct((16, 8), "float32")
    >>> def loss(params, x):
    ...     return (x @ params["w"]).mean()
    >>> program = trace(loss, {"w": w}, x, names={"w": ("embed", "mlp")})
    >>> {dim.name: dim.size for dim in program.dims}
    {'embed': 8, 'mlp': 4, 'batch': 16}
    """
    for position in parameters:
        if position not in range(len(args)):
            raise UserError(f"parameters={tuple(parameters)}, but there are {len(args)} arguments")
    mesh = mesh_of_caller()
    with cudnn.traced(), under(mesh):
        closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    traced = Traced(jaxpr=without_references(closed), args=args, result=out_shape)
    traced = recognised(without_layouts(traced, mesh), recognise)
    return read(traced, names=names, parameters=parameters, state=state, trained=trained, rows=rows)


def read(
    traced: Traced,
    *,
    names: Any = None,
    parameters: Sequence[int] = (0,),
    state: Sequence[int] = (),
    trained: Collection[str] | None = None,
    rows: Sequence[str] = (),
) -> Program:
    """Name the dimensions of a function that was traced; see `trace`."""
    closed, args, out_shape = traced.jaxpr, traced.args, traced.result
    given = axis_names(args, names)
    walk = Walk()
    raw_args = [walk.fresh(shape_of(var)) for var in closed.jaxpr.invars]
    raw = walk.scope(closed.jaxpr, raw_args)

    resolver = Resolver(walk)
    leaves = [(position, path) for position, arg in enumerate(args) for path in by_path(arg)]
    arguments = tuple(
        Argument(
            index=index,
            position=position,
            path=path,
            shape=shape_of(var),
            dtype=var.aval.dtype,
            dims=resolver.array(dims),
            names=names_of(given, position, path, shape_of(var)),
            is_parameter=position in parameters,
            is_trained=position == 0
            and position in parameters
            and jnp.issubdtype(var.aval.dtype, jnp.inexact)
            and (trained is None or path in trained),
            is_state=position in state and position not in parameters,
        )
        for index, ((position, path), var, dims) in enumerate(
            zip(leaves, closed.jaxpr.invars, raw_args, strict=True)
        )
    )
    batch = named.leading_batch(arguments, _read(closed.jaxpr))
    arguments = named.with_names_of_rows(arguments, batch, rows)
    for argument in arguments:
        resolver.note_conflicts(argument.dims, argument.shape, None, argument.path)
    scope = resolver.scope(raw)
    results = tuple(
        Result(path=path_of(keys), shape=leaf.shape, dtype=leaf.dtype, dims=resolver.array(dims))
        for (keys, leaf), dims in zip(jax.tree_util.tree_leaves_with_path(out_shape), raw.outs, strict=True)
    )
    kin = [(resolver.seq(a), resolver.seq(b)) for a, b in walk.kin]
    family = named.families(len(resolver.sizes), kin)
    members: dict[int, list[int]] = {}
    for dim, number in enumerate(family):
        members.setdefault(number, []).append(dim)
    stacks = stacks_of(scope, arguments)
    stacks += taken_of(scope, arguments, stacks)
    return Program(
        jaxpr=closed,
        written=traced.written or closed,
        scope=scope,
        dims=named.build(resolver, arguments, family, batch, {stack.dim for stack in stacks}),
        families=tuple(tuple(ids) for ids in members.values()),
        arguments=arguments,
        results=results,
        batch_dims=batch,
        conflicts=tuple(resolver.conflicts),
        unknown=tuple(
            Unknown(primitive=name, count=len(eqns), where=line_of(eqns[0]))
            for name, eqns in walk.unknown.items()
        ),
        notes=traced.notes,
        stacks=stacks,
    )


def _read(jaxpr: core.Jaxpr) -> set[int]:
    """Return the places of the inputs that the results of a program depend on."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not eqn.effects and needed.isdisjoint(eqn.outvars):
            continue
        body = call_body(eqn) if eqn.primitive.name in _CALLS else None
        places = range(len(eqn.invars)) if body is None else _read(body.jaxpr)
        needed.update(atom for n in places if not isinstance(atom := eqn.invars[n], core.Literal))
    return {n for n, var in enumerate(jaxpr.invars) if var in needed}
