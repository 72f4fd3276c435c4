"""Loops and branches: read once for the forms of what they carry, and split where they need sums complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from ....program.jaxpr import branches, context_of, scan_parts, while_parts
from ..graph import Body, PartGraph, formed, value_of
from ..values import LATE, SHARED, SUM, Form, Held, Kind, NotInParts, examples


def join(a: Form, b: Form) -> Form:
    """Return the form that holds values of either."""
    if a == b or b.kind is Kind.SHARED:
        return a
    if a.kind is Kind.SHARED:
        return b
    if {a.kind, b.kind} == {Kind.SUM, Kind.LATE}:
        return LATE
    raise NotInParts("a loop or branch gives now examples, now sums, or examples along different dimensions")


def scan(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a scan. What its turns need complete sums for is a second scan, after the parts are done."""
    try:
        return _scan(g, eqn, ins)
    except NotInParts as refused:
        if not g.cut or not any(one.kind is Kind.SUM for one in ins):
            raise
        first = refused
    try:
        return _scan(g, eqn, [g.complete(one) if one.kind is Kind.SUM else one for one in ins])
    except NotInParts:
        raise first from None


def _scan(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    parts = scan_parts(eqn)
    consts, carries = parts.num_consts, parts.num_consts + parts.num_carry
    if any(one.kind is Kind.EXAMPLES and one.form.axis == 0 for one in ins[carries:]):
        return _over_rows(g, eqn, ins)
    shift = [0] * carries + [1] * parts.num_xs
    carry = [(one.form, one.uneven) for one in ins[consts:carries]]
    while True:
        shaped = [
            *ins[:consts],
            *(
                Held(one.shape, one.dtype, form, heavy=True, uneven=uneven)
                for one, (form, uneven) in zip(ins[consts:carries], carry, strict=True)
            ),
            *ins[carries:],
        ]
        body = g.body(parts.body, shaped, shift)
        found = [(join(a, b.form), why or b.uneven) for (a, why), b in zip(carry, body.outs, strict=False)]
        if found == carry:
            break
        carry = found
    _check_order(body)
    body.bring([*(form for form, _ in carry), *(out.form for out in body.outs[len(carry) :])])
    return _Split(g, eqn, ins, body, parts.num_consts, parts.num_carry).read()


class _Split:
    """A scan as one that the parts run and, of what is late, one that runs when their sums are complete."""

    def __init__(
        self, g: PartGraph, eqn: core.JaxprEqn, ins: list[Held], body: Body, num_consts: int, num_carry: int
    ) -> None:
        self.g, self.eqn, self.ins, self.body = g, eqn, ins, body
        self.consts = range(num_consts)
        self.carry = range(num_consts, num_consts + num_carry)
        self.xs = range(num_consts + num_carry, len(ins))
        self.of_carry = body.outs[:num_carry]
        self.late = [out.kind is Kind.LATE for out in body.outs]

    def read(self) -> list[Held]:
        outs = dict(self._parts())
        if any(self.late):
            outs |= self._after(self.stacked)
        return [outs[n] for n in range(len(self.eqn.outvars))]

    def _parts(self) -> list[tuple[int, Held]]:
        """Add what each part runs; remember the sums that are needed complete, one for each turn."""
        g, body = self.g, self.body
        first = len(self.consts)
        carry = [n for n in self.carry if not self.late[n - first]]
        rows = [n for n in range(len(self.carry), len(self.late)) if not self.late[n]]
        exports = body.exports
        targets = [*(body.outs[n - first] for n in carry), *(body.outs[n] for n in rows), *exports]
        taken = body.takes(targets)
        consts = [n for n in self.consts if body.ins[n] in taken]
        xs = [n for n in self.xs if body.ins[n] in taken]
        order = [*consts, *carry, *xs]
        run = self._looped(order, len(consts), len(carry), targets)
        ready = [g.bring(self.ins[n], body.ins[n].form) if n in carry else self.ins[n] for n in order]
        forms = [body.outs[n - first].form for n in carry]
        stacked = [body.outs[n].form for n in rows]
        forms += [
            form._replace(axis=form.axis + 1) if form.kind is Kind.EXAMPLES else form for form in stacked
        ]
        places = [n - first for n in carry] + rows
        outs = [
            formed(self.eqn.outvars[n], form, body.outs[n]) for n, form in zip(places, forms, strict=True)
        ]
        length = self.eqn.params["length"]
        outs += [Held((length, *one.shape), one.dtype, SUM, combine=one.combine) for one in exports]
        found = g.emit(run, ready, outs)
        self.stacked = found[len(places) :]
        return list(zip(places, found[: len(places)], strict=True))

    def _after(self, stacked: Sequence[Held]) -> dict[int, Held]:
        """Add what runs when the sums are complete, on them and what is shared."""
        g, body, first = self.g, self.body, len(self.consts)
        late = [n for n, one in enumerate(self.late) if one]
        targets = [body.outs[n] for n in late]
        # What is carried is needed where another turn's is.
        carry = [n for n in late if n < len(self.carry)]
        while True:
            taken = body.takes([*targets, *(body.outs[n] for n in carry)])
            more = [n for n in range(len(self.carry)) if body.ins[first + n] in taken and n not in carry]
            if not more:
                break
            carry += more
        consts = [n for n in self.consts if body.ins[n] in taken]
        xs = [n for n in self.xs if body.ins[n] in taken]
        order = [*consts, *(first + n for n in carry), *xs]
        rows = [n for n in late if n >= len(self.carry)]
        results = [*(body.outs[n] for n in carry), *(body.outs[n] for n in rows)]
        run = self._looped(order, len(consts), len(carry), results, body.leaves)
        ready = [g.complete(self.ins[n]) for n in order] + [g.complete(one) for one in stacked]
        places = [*carry, *rows]
        found = g.emit(run, ready, [value_of(self.eqn.outvars[n]) for n in places])
        return {n: out for n, out in zip(places, found, strict=True) if n in late}

    def _looped(
        self,
        order: list[int],
        consts: int,
        carry: int,
        targets: list[Held],
        leaves: Sequence[Held] = (),
    ) -> Any:
        """Return what runs a scan of the body for `targets`: first the carry, then rows."""
        body, params = self.body, self.eqn.params
        names = [*(body.ins[n] for n in order), *leaves]

        def run(index: Any, *arrays: Any) -> list[Any]:
            def turn(state: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
                known = dict(zip(names, [*arrays[:consts], *state, *slices], strict=True))
                found = body.run(index, targets, known)
                return found[:carry], found[carry:]

            with context_of(self.eqn):
                start = [jnp.asarray(one) for one in arrays[consts : consts + carry]]
                last, rows = lax.scan(
                    turn,
                    start,
                    list(arrays[consts + carry :]),
                    length=params["length"],
                    reverse=params["reverse"],
                    unroll=params["unroll"],
                )
            return [*last, *rows]

        return run


def _over_rows(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a walk over the examples themselves: what it carries are only sums, grown by one row's share."""
    parts = scan_parts(eqn)
    consts, carries = parts.num_consts, parts.num_consts + parts.num_carry
    pre = next(one.form.pre for one in ins[carries:] if one.kind is Kind.EXAMPLES and one.form.axis == 0)
    jaxpr = parts.body.jaxpr
    held = jaxpr.invars[consts:carries]
    same = [a is b for a, b in zip(held, jaxpr.outvars, strict=False)]
    _check_sums(jaxpr, held, {var for var, one in zip(held, same, strict=True) if not one})
    ready = [g.shared(one) for one in ins[:consts]]
    ready += [g.shared(v) if one else g.sum(v) for v, one in zip(ins[consts:carries], same, strict=True)]
    ready += [g.rows(one, 0, pre) for one in ins[carries:]]
    function = core.jaxpr_as_fun(parts.body)
    params = eqn.params

    def run(_: Any, *arrays: Any) -> list[Any]:
        def turn(state: Any, row: Any) -> Any:
            found = function(*arrays[:consts], *state, *row)
            return list(found[: len(held)]), list(found[len(held) :])

        with context_of(eqn):
            start, rows = list(arrays[consts:carries]), list(arrays[carries:])
            length = params["length"] // g.parts
            last, out = lax.scan(
                turn, start, rows, length=length, reverse=params["reverse"], unroll=params["unroll"]
            )
        return [*last, *out]

    forms = [SHARED if one else SUM for one in same]
    forms += [examples(0, pre)] * (len(eqn.outvars) - len(forms))
    outs = [formed(var, form) for var, form in zip(eqn.outvars, forms, strict=True)]
    return g.emit(run, ready, outs)


def _check_sums(jaxpr: core.Jaxpr, held: Sequence[Any], grown: set[Any]) -> None:
    """Refuse unless each value in `grown` is only added to, once, and handed on."""
    why = NotInParts("the examples are walked one after another, and what is carried is more than a sum")
    source: dict[Any, Any] = {var: var for var in grown}
    # The latest state of each sum, which nothing has used yet.
    fresh = set(grown)
    for eqn in jaxpr.eqns:
        inside = [var for var in eqn.invars if not isinstance(var, core.Literal) and var in source]
        if not inside:
            continue
        aval: Any = inside[0].aval
        name = eqn.primitive.name
        same = name == "convert_element_type" and eqn.params["new_dtype"] == aval.dtype
        adds = (same or name in ("add", "add_any")) and len(inside) == 1 and inside[0] in fresh
        if not adds or aval.shape != value_of(eqn.outvars[0]).shape:
            raise why
        fresh.discard(inside[0])
        source[eqn.outvars[0]] = source[inside[0]]
        fresh.add(eqn.outvars[0])
    for place, out in enumerate(jaxpr.outvars):
        found = None if isinstance(out, core.Literal) else source.get(out)
        mine = held[place] if place < len(held) and held[place] in grown else None
        if found is not mine or (mine is not None and out not in fresh):
            raise why
        fresh.discard(out)


def while_loop(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a while loop, which runs as often for every part, or by `jax.vmap` for each row as it needs."""
    parts = while_parts(eqn)
    tests, bodies = parts.num_cond_consts, parts.num_cond_consts + parts.num_body_consts
    ins = [g.shared(one) if one.kind is Kind.SUM and n < bodies else one for n, one in enumerate(ins)]
    carry = [one.form for one in ins[bodies:]]
    while True:
        shaped = [
            Held(one.shape, one.dtype, form, heavy=True)
            for one, form in zip(ins[bodies:], carry, strict=True)
        ]
        body = g.body(parts.body, [*ins[tests:bodies], *shaped])
        found = [join(a, b.form) for a, b in zip(carry, body.outs, strict=True)]
        if found == carry:
            break
        carry = found
    _check_order(body)
    body.bring(carry)
    shaped = [Held(one.shape, one.dtype, form) for one, form in zip(ins[bodies:], carry, strict=True)]
    test = g.body(parts.cond, [*ins[:tests], *shaped])
    goes_on = test.outs[0]
    if goes_on.kind not in (Kind.SHARED, Kind.EXAMPLES):
        raise NotInParts("how often a loop runs depends on the examples")
    if goes_on.kind is Kind.EXAMPLES and carry != [goes_on.form] * len(carry):
        # What a row carries changes as long as that row goes on.
        return while_loop(g, eqn, [*ins[:bodies], *(g.bring(one, goes_on.form) for one in ins[bodies:])])
    _check_complete(body, test)
    ready = [*ins[:bodies], *(g.bring(one, form) for one, form in zip(ins[bodies:], carry, strict=True))]

    def run(index: Any, *arrays: Any) -> list[Any]:
        def goes(state: list[Any]) -> Any:
            return test.run(index, test.outs, dict(zip(test.ins, [*arrays[:tests], *state], strict=True)))[0]

        def turn(state: list[Any]) -> list[Any]:
            found = body.run(
                index, body.outs, dict(zip(body.ins, [*arrays[tests:bodies], *state], strict=True))
            )
            if goes_on.shape == ():
                return found
            own = goes(state)
            rows = zip(found, state, strict=True)
            return [jnp.where(jnp.expand_dims(own, range(own.ndim, a.ndim)), a, b) for a, b in rows]

        def go(state: list[Any]) -> Any:
            return goes(state) if goes_on.shape == () else jnp.any(goes(state))

        with context_of(eqn):
            return lax.while_loop(go, turn, list(arrays[bodies:]))

    outs = [formed(var, form) for var, form in zip(eqn.outvars, carry, strict=True)]
    return g.emit(run, ready, outs)


def cond(g: PartGraph, eqn: core.JaxprEqn, ins: list[Held]) -> list[Held]:
    """Read a choice among branches, which is the same for every part."""
    which, args = g.shared(ins[0]), [g.shared(one) if one.kind is Kind.SUM else one for one in ins[1:]]
    arms = [g.body(arm, args) for arm in branches(eqn)]
    _check_complete(*arms)
    _check_order(*arms)
    forms = [out.form for out in arms[0].outs]
    for arm in arms[1:]:
        forms = [join(form, out.form) for form, out in zip(forms, arm.outs, strict=True)]
    for arm in arms:
        arm.bring(forms)
    _check_complete(*arms)

    def run(index: Any, number: Any, *arrays: Any) -> Any:
        def branch(arm: Body) -> Any:
            return lambda *own: arm.run(index, arm.outs, dict(zip(arm.ins, own, strict=True)))

        with context_of(eqn):
            if jax.numpy.result_type(number) == jnp.bool_:
                number = number.astype(jnp.int32)
            return lax.switch(number, [branch(arm) for arm in arms], *arrays)

    given = zip(*(arm.outs for arm in arms), strict=True)
    outs = [formed(var, form, *own) for var, form, own in zip(eqn.outvars, forms, given, strict=True)]
    return g.emit(run, [which, *args], outs)


def _check_complete(*bodies: Body) -> None:
    if any(body.graph.exports for body in bodies):
        raise NotInParts(
            "a sum over the examples is needed complete inside of a branch or a loop without an end"
        )


def _check_order(*bodies: Body) -> None:
    if any(out.form.is_moved for body in bodies for out in body.outs):
        raise NotInParts("a loop or branch hands examples on in the order that a sort has brought them in")
