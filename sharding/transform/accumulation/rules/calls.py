"""Calls that stay calls: checkpoints, attention, solvers, and functions with derivatives of their own.

A derivative that the user wrote is traced on the whole batch, where its sizes mean what they say, and read
as the rest is.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from ....ops.experts import experts_call, jitted
from ....program.jaxpr import call_body, closed, context_of
from ..derivatives import written_derivative, written_gradient
from ..graph import Body, PartGraph, Reading, Rule, formed, inlined, value_of
from ..values import SUM, Form, Held, Kind, NotInParts


def checkpoint(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a checkpoint: one for the parts, and after it what needs their sums complete.

    Where a sum comes back to the examples inside, it is opened.
    """
    inner, params = closed(eqn.params["jaxpr"]), eqn.params
    try:
        body = g.body(inner, ins)
    except NotInParts:
        if not g.cut:
            raise
        return g.read(inner, ins)

    def around(function: Any) -> Any:
        return jax.checkpoint(function, policy=params["policy"], prevent_cse=params["prevent_cse"])

    return _called(g, eqn, ins, body, around)


def attention(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a call of `ops.attention`, which stays one for the plan's kernel to carry out."""
    inner = call_body(eqn)
    assert inner is not None
    body = g.body(inner, ins)
    if body.exports:
        return g.read(inner, ins)

    def around(function: Any) -> Any:
        function.__name__ = function.__qualname__ = eqn.params["name"]
        return jax.jit(function)

    return _called(g, eqn, ins, body, around)


def experts(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a call of `ops.experts`, which takes each token by itself, whichever dimension has examples."""
    call = experts_call(eqn)
    assert call is not None
    form = next(one.form for one in ins if one.kind is Kind.EXAMPLES)
    if form.axis > 1 or any(one.kind is Kind.EXAMPLES for one in ins[3:]):
        raise NotInParts("the experts differ from example to example")
    tokens = [g.rows(one, form.axis, form.pre) for one in ins[:3]]

    def run(index: Any, *arrays: Any) -> list[Any]:
        del index
        with context_of(eqn):
            return [jitted(call)(*arrays)]

    return g.emit(run, [*tokens, *(g.shared(one) for one in ins[3:])], [formed(eqn.outvars[0], form)])


def _called(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held], body: Body, around: Any) -> list[Held]:
    """Add a call of `body` by the parts, and what it leaves for later."""
    late = [out.kind is Kind.LATE for out in body.outs]
    now = [n for n, one in enumerate(late) if not one]
    targets = [*(body.outs[n] for n in now), *body.exports]
    taken = body.takes(targets)
    places = [n for n, one in enumerate(body.ins) if one in taken]
    own = [body.ins[n] for n in places]

    def run(index: Any, *arrays: Any) -> list[Any]:
        def called(*arrays: Any) -> list[Any]:
            return body.run(index, targets, dict(zip(own, arrays, strict=True)))

        with context_of(eqn):
            return list(around(called)(*arrays))

    outs = [formed(eqn.outvars[n], body.outs[n].form, body.outs[n]) for n in now]
    outs += [Held(one.shape, one.dtype, SUM, combine=one.combine) for one in body.exports]
    found = g.emit(run, [ins[n] for n in places], outs)
    results = dict(zip(now, found, strict=False))
    if any(late):
        wanted = [n for n, one in enumerate(late) if one]
        rest = [body.outs[n] for n in wanted]
        needs = body.takes(rest)
        again = [n for n, one in enumerate(body.ins) if one in needs]
        known = [*(body.ins[n] for n in again), *body.leaves]

        def after(index: Any, *arrays: Any) -> list[Any]:
            return body.run(index, rest, dict(zip(known, arrays, strict=True)))

        ready = [g.complete(ins[n]) for n in again] + [g.complete(one) for one in found[len(now) :]]
        results |= zip(wanted, g.emit(after, ready, [value_of(eqn.outvars[n]) for n in wanted]), strict=True)
    return [results[n] for n in range(len(late))]


def custom_vjp(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a function whose gradient the user wrote."""
    ins = [g.shared(one) if one.kind is Kind.SUM else one for one in ins]
    plain = call_body(eqn)
    assert plain is not None
    primal = g.body(plain, ins)
    written = written_gradient(eqn, [one.heavy for one in ins])
    floats, learns = written.floats, written.learns
    there = g.body(written.ahead, ins, reading=_as_they_are(g))
    forms = [join_results(a.form, b.form) for a, b in zip(primal.outs, there.outs, strict=False)]
    primal.bring(forms)
    there.bring([*forms, *(out.form for out in there.outs[len(forms) :])])
    cotangents = [
        Held(out.shape, out.dtype, _dual(form))
        for out, form, one in zip(primal.outs, forms, learns, strict=True)
        if one
    ]
    back = g.body(written.back, [*there.outs[len(forms) :], *cotangents], reading=_as_they_are(g))
    back.bring([_dual(value.form) for value, one in zip(ins, floats, strict=True) if one])
    _check_complete(primal, there, back)

    def run(index: Any, *arrays: Any) -> list[Any]:
        @jax.custom_vjp
        def call(index: Any, *arrays: Any) -> Any:
            return primal.run(index, primal.outs, dict(zip(primal.ins, arrays, strict=True)))

        def fwd(index: Any, *arrays: Any) -> Any:
            found = there.run(index, there.outs, dict(zip(there.ins, arrays, strict=True)))
            return found[: len(forms)], (index, found[len(forms) :])

        def bwd(kept: Any, cotangents: Any) -> Any:
            index, residuals = kept
            own = [ct for ct, one in zip(cotangents, learns, strict=True) if one]
            found = iter(back.run(index, back.outs, dict(zip(back.ins, [*residuals, *own], strict=True))))
            return (None, *(next(found) if one else None for one in floats))

        call.defvjp(fwd, bwd)
        with context_of(eqn):
            return call(index, *arrays)

    outs = [formed(var, form) for var, form in zip(eqn.outvars, forms, strict=True)]
    return g.emit(run, ins, outs)


def custom_jvp(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a function whose derivative the user wrote."""
    ins = [g.shared(one) if one.kind is Kind.SUM else one for one in ins]
    plain = call_body(eqn)
    assert plain is not None
    primal = g.body(plain, ins)
    traced, floats, learns = written_derivative(eqn)
    moving = [one for one, learnt in zip(ins, floats, strict=True) if learnt]
    rule = g.body(traced, [*ins, *moving], reading=_as_they_are(g))
    count = len(primal.outs)
    forms = [join_results(a.form, b.form) for a, b in zip(primal.outs, rule.outs, strict=False)]
    primal.bring(forms)
    rule.bring([*forms, *(form for form, one in zip(forms, learns, strict=True) if one)])
    _check_complete(primal, rule)

    def run(index: Any, *arrays: Any) -> list[Any]:
        @jax.custom_jvp
        def call(index: Any, *arrays: Any) -> Any:
            return primal.run(index, primal.outs, dict(zip(primal.ins, arrays, strict=True)))

        @call.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            index, *own = primals
            moved = [one for one, learnt in zip(tangents[1:], floats, strict=True) if learnt]
            found = rule.run(index, rule.outs, dict(zip(rule.ins, [*own, *moved], strict=True)))
            given = iter(found[count:])
            outs = found[:count]
            return outs, [
                next(given) if one else np.zeros(out.shape, jax.dtypes.float0)
                for one, out in zip(learns, outs, strict=True)
            ]

        with context_of(eqn):
            return call(index, *arrays)

    outs = [formed(var, form) for var, form in zip(eqn.outvars, forms, strict=True)]
    return g.emit(run, ins, outs)


def linear_solve(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read `lax.custom_linear_solve`: the system of each example by itself."""
    counts, programs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    names = ("matvec", "vecmat", "solve", "transpose_solve")
    consts: dict[str, list[int]] = {}
    first = 0
    for name in names:
        consts[name] = list(range(first, first + getattr(counts, name)))
        first += getattr(counts, name)
    ins = [g.shared(one) if one.kind is Kind.SUM else one for one in ins]
    right = ins[first:]
    form = next((one.form for one in right if one.kind is Kind.EXAMPLES), None)
    if form is None:
        # Of matrices of the examples the right side may be the same for all.
        product = g.body(closed(programs.matvec), [*(ins[n] for n in consts["matvec"]), *right])
        form = next((one.form for one in product.outs if one.kind is Kind.EXAMPLES), None)
    if form is None:
        raise NotInParts("one linear system is made of all examples, and its solver runs through them")
    right = [g.bring(one, form) for one in right]
    bodies: dict[str, Body] = {}
    for name in names:
        program = getattr(programs, name)
        if program is not None:
            bodies[name] = g.body(closed(program), [*(ins[n] for n in consts[name]), *right])
            bodies[name].bring([form] * len(right))
    _check_complete(*bodies.values())

    def run(index: Any, *arrays: Any) -> list[Any]:
        def function(name: str) -> Any:
            body = bodies[name]

            def call(*own: Any) -> list[Any]:
                values = [*(arrays[n] for n in consts[name]), *own[-1]]
                return body.run(index, body.outs, dict(zip(body.ins, values, strict=True)))

            return call

        back = function("transpose_solve") if "transpose_solve" in bodies else None
        with context_of(eqn):
            return lax.custom_linear_solve(
                function("matvec"), list(arrays[first:]), function("solve"), transpose_solve=back
            )

    outs = [formed(var, form) for var in eqn.outvars]
    return g.emit(run, [*ins[:first], *right], outs)


def _as_they_are(g: PartGraph) -> Reading:
    """Return the reading of `g` within a derivative that is written out, which is not taken again."""

    def rule(eqn: core.JaxprEqn) -> Rule:
        custom = eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call")
        return inlined if custom else g.reading.rule(eqn)

    return g.reading._replace(rule=rule)


def join_results(a: Form, b: Form) -> Form:
    """Return the form of a result of a function, and of what its derivative's rule gives of it."""
    if a == b or b.kind is Kind.SHARED:
        return a
    if a.kind is Kind.SHARED:
        return b
    raise NotInParts("a function and the rule of its derivative give different things of the examples")


def _dual(form: Form) -> Form:
    """Return the form of a value's gradient, of which parts have their shares."""
    if form.kind is Kind.EXAMPLES:
        return form
    return SUM if form.kind is Kind.SHARED else Form(Kind.SHARED)


def _check_complete(*bodies: Body) -> None:
    if any(body.graph.exports for body in bodies):
        raise NotInParts(
            "a sum over the examples is needed complete inside of a function with a derivative of its own"
        )
