"""Jaxprs: tracing, reading under every generation of JAX, and running again with parts done otherwise.

What differs between the generations that are supported (0.10 and 0.12), and what JAX does not make public, is
here, in `ops/cudnn.py` (its cuDNN calls) and in the runtime's detection of clusters, and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util  # seen in 0.10.2 and 0.12.0
from jax._src.state import discharge  # seen in 0.10.2 and 0.12.0
from jax.core import Tracer
from jax.extend import core
from jax.sharding import AxisType

from ..ops import cudnn
from .around import is_at_once, under
from .identity import fingerprint
from .primitives import Trait, primitives
from .program import Equation, Program, Scope

# Functions whose gradients read their results beside a factor: before JAX 0.11 that of tanh is
# g (1 + y) (1 - y), of y and of 1 - y; since then of their product alone.
RESULT_READ_TOO = frozenset({"tanh"} if jax.__version_info__ < (0, 11) else ())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """A function traced on some arguments: its jaxpr, and its arguments and result as ShapeDtypeStructs.

    `written` is the jaxpr that JAX traced, where `jaxpr` is rewritten by what was recognised in it; `notes`
    are what a plan should tell of that.
    """

    jaxpr: core.ClosedJaxpr
    args: tuple[Any, ...]
    result: Any
    written: core.ClosedJaxpr | None = None
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of the program as the user wrote it; see `identity`."""
        return fingerprint(self.written or self.jaxpr)


class Traces:
    """The traces of `fn`: one for each shape and type of its arguments, taken when first asked for.

    `fn` is called once for each, however often and inside of whatever else that is traced it is asked for.
    `rewrite` gives what is read in place of a trace, once for each; see `recognise`. `fn` is called under
    `mesh`, if one is given.
    """

    def __init__(
        self, fn: Callable[..., Any], rewrite: Callable[[Traced], Traced] | None = None, mesh: Any = None
    ) -> None:
        # An object of our own, so that what `fn` reads from outside is read anew for each Traces.
        self._fn = functools.partial(fn)
        self._rewrite = rewrite or (lambda traced: traced)
        self._jitted = jax.jit(self._fn)
        self._known: dict[int, tuple[core.ClosedJaxpr, Traced]] = {}
        self._mesh = mesh

    def on(self, *args: Any) -> Traced:
        """Return the trace on arguments like `args`, of which nothing is computed."""
        # Where arrays lie is no part of the program.
        shapes = shapes_of(args)
        with cudnn.traced(), under(self._mesh):
            found = self._jitted.trace(*shapes)
        if len(found.jaxpr.in_avals) != len(jax.tree.leaves(shapes)):
            # It reads what is being traced outside, which is another thing each time.
            with cudnn.traced(), under(self._mesh):
                jaxpr, result = jax.make_jaxpr(self._fn, return_shape=True)(*shapes)
            return self._rewrite(Traced(jaxpr=without_references(jaxpr), args=shapes, result=result))
        # JAX gives the same jaxpr for the same arguments, and another where settings differ.
        key = id(found.jaxpr.jaxpr)
        if key not in self._known:
            traced = Traced(jaxpr=without_references(found.jaxpr), args=shapes, result=found.out_info)
            # The first jaxpr is kept, so that its id stays its own.
            self._known[key] = found.jaxpr, self._rewrite(traced)
        return self._known[key][1]


def without_references(jaxpr: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Return a program that makes no mutable arrays (`jax.new_ref`): what it writes, its loops carry."""
    return discharge.discharge_state(jaxpr) if _references(jaxpr.jaxpr) else jaxpr


def _references(jaxpr: Any) -> bool:
    names = ("new_ref", "run_state")
    inner = (one for eqn in jaxpr.eqns for one in core.jaxprs_in_params(eqn.params))
    return any(eqn.primitive.name in names for eqn in jaxpr.eqns) or any(map(_references, inner))


def asked(
    fn: Callable[..., Any],
    within: Callable[[Callable[[], Sequence[Any]]], contextlib.AbstractContextManager[None]],
    check: Callable[[Any], None],
) -> Callable[..., Any]:
    """Return `fn`, called in the context that `within` gives, its result `check`ed.

    `within` may ask for the arguments, if something fails.
    """

    @functools.wraps(fn)
    def function(*args: Any) -> Any:
        with within(lambda: args):
            result = fn(*args)
        check(result)
        return result

    return function


def shapes_of(tree: Any) -> Any:
    """Return arrays, or what is like them, as ShapeDtypeStructs, weak types included."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        # Python's own numbers have no type that insists on itself.
        is_weak = getattr(leaf, "weak_type", None) or type(leaf) in (int, float, complex)
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), weak_type=is_weak)

    return jax.tree.map(shape, tree)


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """Return `jaxpr` with its constants: 0.12 keeps jaxprs in equations open when they have none."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def is_array(value: Any) -> bool:
    """Whether `value` is an array of JAX's with numbers in it, rather than one that is being traced."""
    return isinstance(value, jax.Array) and not isinstance(value, Tracer)


def is_extended(dtype: Any) -> bool:
    """Whether `dtype` is one of JAX's own kinds, as random keys are, of which there is no zero."""
    return jnp.issubdtype(dtype, jax.dtypes.extended)


def call_body(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Return what a call (jit, remat, custom derivative) runs on its inputs, or None if it is no call."""
    params = equation.params
    body = params.get("call_jaxpr", params.get("jaxpr"))
    return closed(body) if isinstance(body, (core.Jaxpr, core.ClosedJaxpr)) else None


def branches(equation: core.JaxprEqn) -> tuple[core.ClosedJaxpr, ...]:
    """Return the arms of a `cond` equation; its first input is the index, the rest are theirs."""
    return tuple(closed(arm) for arm in equation.params["branches"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanParts:
    """A `scan` equation's body and how its inputs divide: constants, then carry, then stacked arrays."""

    body: core.ClosedJaxpr
    num_consts: int
    num_carry: int
    num_xs: int


def scan_parts(equation: core.JaxprEqn) -> ScanParts:
    """Read a `scan` equation: 0.10 counts its inputs, 0.12 keeps them as flat trees."""
    params = equation.params
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:
        consts, carry = (len(part) for part in params["ft_in"].unpack()[:2])
    return ScanParts(
        body=closed(params["jaxpr"]),
        num_consts=consts,
        num_carry=carry,
        num_xs=len(equation.invars) - consts - carry,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhileParts:
    """A `while` equation's two bodies; its inputs are the condition's constants, the body's, the carry."""

    cond: core.ClosedJaxpr
    body: core.ClosedJaxpr
    num_cond_consts: int
    num_body_consts: int


def while_parts(equation: core.JaxprEqn) -> WhileParts:
    """Read a `while` equation."""
    params = equation.params
    return WhileParts(
        cond=closed(params["cond_jaxpr"]),
        body=closed(params["body_jaxpr"]),
        num_cond_consts=params["cond_nconsts"],
        num_body_consts=params["body_nconsts"],
    )


def counted_trips(equation: core.JaxprEqn) -> int | None:
    """Return how often a `while` runs, if it counts by one from one constant to another; else None."""
    parts = while_parts(equation)
    cond, body = parts.cond.jaxpr, parts.body.jaxpr
    if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != "lt":
        return None
    counter, limit = cond.eqns[0].invars
    places = [n for n, var in enumerate(cond.invars[parts.num_cond_consts :]) if var is counter]
    if not places:
        return None
    place = places[0]
    start = equation.invars[parts.num_cond_consts + parts.num_body_consts + place]
    stop = limit
    if not isinstance(limit, core.Literal):
        bounds = [n for n, var in enumerate(cond.invars) if var is limit]
        if not bounds or bounds[0] >= parts.num_cond_consts:
            return None
        stop = equation.invars[bounds[0]]
    if not isinstance(start, core.Literal) or not isinstance(stop, core.Literal):
        return None
    before, after = body.invars[parts.num_body_consts + place], body.outvars[place]
    by_one = any(
        eqn.primitive.name == "add"
        and eqn.outvars[0] is after
        and eqn.invars[0] is before
        and isinstance(eqn.invars[1], core.Literal)
        and int(eqn.invars[1].val) == 1
        for eqn in body.eqns
    )
    return max(int(stop.val) - int(start.val), 0) if by_one else None


@contextlib.contextmanager
def context_of(equation: core.JaxprEqn) -> Iterator[None]:
    """Within it, new equations carry the source line, name scope and settings of `equation`."""
    info = equation.source_info
    scope = source_info_util.current_name_stack() + info.name_stack
    around = jax.sharding.get_abstract_mesh()
    with source_info_util.user_context(info.traceback, name_stack=scope), equation.ctx.manager:
        if AxisType.Manual not in around.axis_types and not is_at_once():
            yield
            return
        # The mesh that was set where the loss was traced is not that of a region it is run in.
        with jax.sharding.use_abstract_mesh(around):
            yield


def run(equation: core.JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """Run one equation as it stands."""
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return outputs if equation.primitive.multiple_results else [outputs]


# What an equation that holds a program runs on its inputs; of a scan, on constants, carry and slices.
Body = Callable[[list[Any]], list[Any]]


class Go(Protocol):
    """What remains to be done of an equation after a pass: what the passes after it do, then to run it.

    For an equation that holds a program, `around` is laid around its body, inside of what the passes after
    it lay there.
    """

    def __call__(self, inputs: list[Any], around: Callable[[Body], Body] | None = None) -> Sequence[Any]: ...


class Pass:
    """A way of running some equations of a program otherwise; what it leaves alone is run as it stands.

    Values may be pytrees of a pass's own, which it takes apart before an equation is run on them.
    """

    def begin(self, scope: Scope, inputs: list[Any]) -> list[Any]:
        """Return what to run `scope` on, given its `inputs`."""
        del scope
        return inputs

    def visit(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        """Return the results of `equation`."""
        del equation
        return go(inputs)

    def end(self, scope: Scope, outputs: list[Any]) -> list[Any]:
        """Return what `scope` gives, having been run to `outputs`."""
        del scope
        return outputs


def rewritten(program: Program, passes: Sequence[Pass], inputs: Sequence[Any]) -> list[Any]:
    """Run `program` again, equation by equation, as `passes` say, and return its results.

    Inputs and results are flat. The first pass is asked first, and hands on to the next. Source lines, name
    scopes and settings of the original equations are kept. Jitted calls, scans and checkpoints are gone into;
    what else holds a program is run as it stands.
    """
    return Rewriter(passes).scope(program.scope, program.jaxpr.consts, list(inputs))


class Rewriter:
    """Runs equations again, as `passes` say."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self._passes = passes

    def run(self, equation: Equation, inputs: list[Any]) -> Sequence[Any]:
        """Return the results of one equation on `inputs`."""
        with context_of(equation.eqn):
            return self._visit(0, equation, inputs, ())

    def scope(self, scope: Scope, consts: Sequence[Any], inputs: list[Any]) -> list[Any]:
        """Return the results of a program on `inputs`."""
        for one in reversed(self._passes):
            inputs = one.begin(scope, inputs)
        values: dict[Any, Any] = dict(zip(scope.jaxpr.constvars, map(_constant, consts), strict=True))
        values.update(zip(scope.jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for equation in scope.equations:
            outputs = self.run(equation, [read(atom) for atom in equation.eqn.invars])
            values.update(zip(equation.eqn.outvars, outputs, strict=True))
        results = [read(atom) for atom in scope.jaxpr.outvars]
        for one in reversed(self._passes):
            results = one.end(scope, results)
        return results

    def _visit(
        self, number: int, equation: Equation, inputs: list[Any], arounds: tuple[Callable[[Body], Body], ...]
    ) -> Sequence[Any]:
        if number == len(self._passes):
            return self._run(equation, inputs, arounds)

        def go(inputs: list[Any], around: Callable[[Body], Body] | None = None) -> Sequence[Any]:
            return self._visit(number + 1, equation, inputs, (*arounds, around) if around else arounds)

        return self._passes[number].visit(equation, inputs, go)

    def _run(
        self, equation: Equation, inputs: list[Any], arounds: Sequence[Callable[[Body], Body]]
    ) -> Sequence[Any]:
        again = _AGAIN.get(equation.primitive)
        if again is None or not equation.scopes:
            return run(equation.eqn, inputs)
        own = closed(equation.eqn.params["jaxpr"])
        if equation.scopes[0].jaxpr is not own.jaxpr:
            # The scope only stands for what is run.
            return run(equation.eqn, inputs)
        consts = own.consts

        body: Body = functools.partial(self.scope, equation.scopes[0], consts)
        for around in arounds:
            body = around(body)
        return again(equation.eqn, inputs, body)


def _call_again(equation: core.JaxprEqn, inputs: list[Any], body: Body) -> Sequence[Any]:
    del equation
    return body(inputs)


def _checkpoint_again(equation: core.JaxprEqn, inputs: list[Any], body: Body) -> Sequence[Any]:
    params = equation.params
    return jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])(inputs)


def _scan_again(equation: core.JaxprEqn, inputs: list[Any], body: Body) -> Sequence[Any]:
    parts = scan_parts(equation)
    first_xs = parts.num_consts + parts.num_carry

    def turn(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = body([*inputs[: parts.num_consts], *carry, *slices])
        return outputs[: parts.num_carry], outputs[parts.num_carry :]

    carry, rows = jax.lax.scan(
        turn,
        inputs[parts.num_consts : first_xs],
        inputs[first_xs:],
        length=equation.params["length"],
        reverse=equation.params["reverse"],
        unroll=equation.params["unroll"],
    )
    return [*carry, *rows]


def _region_again(equation: core.JaxprEqn, inputs: list[Any], body: Body) -> Sequence[Any]:
    params = equation.params
    region = jax.shard_map(
        lambda *args: tuple(body(list(args))),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return region(*inputs)


def _constant(const: Any) -> Any:
    """Return a constant, or where it has no elements one that is made where it is read.

    Whole slices as indices are arrays without elements. XLA of JAX 0.11 ends the process when one comes into
    a manual region from outside.
    """
    if not isinstance(const, (jax.Array, np.ndarray)) or const.size or is_extended(const.dtype):
        return const
    return jnp.zeros(const.shape, const.dtype)


def run_around(equation: core.JaxprEqn, inputs: list[Any], body: Body) -> Sequence[Any]:
    """Run a jitted call, a scan, a checkpoint or a manual region with `body` in place of its program."""
    name = equation.primitive.name
    again = _region_again if name == "shard_map" else _AGAIN[name]
    return again(equation, inputs, body)


# How what is gone into is run with another body.
_AGAIN: dict[str, Callable[[core.JaxprEqn, list[Any], Body], Sequence[Any]]] = {
    "jit": _call_again,
    "scan": _scan_again,
    **dict.fromkeys(primitives(Trait.CHECKPOINT), _checkpoint_again),
}


def inlined(equation: core.JaxprEqn, call: core.JaxprEqn | None) -> core.JaxprEqn:
    """Return `equation`, of what `call` runs, with the name scope of both, as it stands outside."""
    if call is None or not str(call.source_info.name_stack):
        return equation
    info = equation.source_info
    stack = call.source_info.name_stack + info.name_stack
    return equation.replace(source_info=info.replace(name_stack=stack))


def with_inputs(jaxpr: core.Jaxpr, **parts: Any) -> core.Jaxpr:
    """Return `jaxpr` with other ``constvars``, ``invars``, ``eqns`` and ``outvars``."""
    debug = jaxpr.debug_info
    if len(parts["invars"]) != len(jaxpr.invars) or parts["constvars"]:
        debug = debug.with_unknown_names()
    return jaxpr.replace(**parts, debug_info=debug)


def again(
    equation: core.JaxprEqn, bodies: Sequence[core.ClosedJaxpr], more: Sequence[Any]
) -> tuple[core.ClosedJaxpr, list[Any]]:
    """Return `equation`, a scan, cond or checkpoint, with other `bodies` as a program, and what it is run on.

    Each body takes the original's inputs and then `more`. Inputs that no body reads are left out.
    """
    inputs = [*equation.invars, *more]
    given = [n for n, atom in enumerate(inputs) if not isinstance(atom, core.Literal)]
    if equation.primitive.name in primitives(Trait.CHECKPOINT):
        return _checkpoint_of(equation, bodies[0], inputs)

    def run_again(*values: Any) -> Sequence[Any]:
        full: list[Any] = [getattr(atom, "val", None) for atom in inputs]
        for n, value in zip(given, values, strict=True):
            full[n] = value
        own, extra = full[: len(equation.invars)], full[len(equation.invars) :]
        if equation.primitive.name == "scan":
            return _scan_again(equation, own, lambda xs: core.jaxpr_as_fun(bodies[0])(*xs, *extra))
        arms = [lambda *xs, body=body: core.jaxpr_as_fun(body)(*xs) for body in bodies]
        return jax.lax.switch(own[0], arms, *own[1:], *extra)

    kinds = [
        jax.ShapeDtypeStruct(
            atom.aval.shape, atom.aval.dtype, weak_type=getattr(atom.aval, "weak_type", False)
        )
        for atom in (inputs[n] for n in given)
    ]
    made = jax.make_jaxpr(run_again)(*kinds)
    return made, [inputs[n] for n in given]


def _checkpoint_of(
    equation: core.JaxprEqn, body: core.ClosedJaxpr, inputs: Sequence[Any]
) -> tuple[core.ClosedJaxpr, list[Any]]:
    read = {atom for eqn in body.eqns for atom in eqn.invars if not isinstance(atom, core.Literal)}
    read.update(atom for atom in body.jaxpr.outvars if not isinstance(atom, core.Literal))
    used = [n for n, var in enumerate(body.jaxpr.invars) if var in read]
    inner = with_inputs(
        body.jaxpr,
        constvars=[],
        invars=[body.jaxpr.invars[n] for n in used],
        eqns=body.jaxpr.eqns,
        outvars=body.jaxpr.outvars,
    )
    outer: list[Any] = [core.Var(inputs[n].aval) for n in used]
    results = [core.Var(var.aval) for var in equation.outvars]
    made = equation.replace(invars=outer, outvars=results, params={**equation.params, "jaxpr": inner})
    program = with_inputs(body.jaxpr, constvars=[], invars=outer, eqns=[made], outvars=results)
    return core.ClosedJaxpr(program, []), [inputs[n] for n in used]
