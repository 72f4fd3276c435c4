"""A function in two: what other work waits for first, and the rest later.

Of a backward pass the rest are gradients of weights. Equations that only these need are put off from their
first product on; what such a product is of is a residual, which is kept until then, unless it is made of
nothing else than what is there again. So every product is made once, in one of the two. Of a forward and a
backward pass together the rest is all that the forward one does not need.

A scan over layers is gone into: its first half keeps what its carry needs and gives residuals stacked, its
second is a scan over these, whose turns wait for one another only where gradients of all turns are added up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from ...program.jaxpr import call_body, context_of, run, run_around, scan_parts, with_inputs
from ...program.primitives import Trait, primitives

Array = Any
# Gives a list of arrays of arrays.
Function = Callable[..., list[Array]]

_CHECKPOINTS = primitives(Trait.CHECKPOINT)
_CALLS = frozenset({"jit", "closed_call"}) | _CHECKPOINTS
_PRODUCTS = primitives(Trait.PRODUCT)
# Gives its operands on, all of them at once.
_BARRIER = "optimization_barrier"
# Kernels that are not looked into: nobody computes so what is not worth putting off.
_KERNELS = frozenset({"pallas_call", "ffi_call", "custom_partitioning", "linear_call"})
# What of the arguments that are there again is made once more rather than kept.
_LIGHT = primitives(Trait.MOVE) | primitives(Trait.ELEMENTWISE)
_ACTING = frozenset({"debug_callback", "debug_print", "io_callback"})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Halves:
    """A function in two.

    early: of all arguments, the outputs that are not late and then the residuals.
    late: of the arguments that are there again and then the residuals, the outputs that are late.
    is_late: of each output, whether it is.
    residuals: shapes and types of what is kept between the two.
    """

    early: core.ClosedJaxpr
    late: core.ClosedJaxpr
    is_late: tuple[bool, ...]
    residuals: tuple[jax.ShapeDtypeStruct, ...]


def split(
    function: Function,
    args: Sequence[Array],
    awaited: Sequence[bool],
    again: Sequence[bool],
    new: Sequence[bool] | None = None,
) -> Halves:
    """Return a function in two, traced on `args`.

    Outputs that are `awaited` are early, and so are others that take no product which these do not need. The
    arguments that are there `again` later, and what the function closes over, are no residuals. Where some
    arguments are `new` later, nothing is early but what is awaited, and no equation but what that needs.

    >>> import jax.numpy as jnp
    >>> def back(w, x, dy):
    ...     return [dy @ w.T, x.T @ dy]
    >>> args = jnp.ones((2, 3)), jnp.ones((5, 2)), jnp.ones((5, 3))
    >>> halves = split(back, args, awaited=(True, False), again=(True, False, False))
    >>> [one.shape for one in halves.residuals]
    [(5, 3), (2, 5)]
    """
    whole = jax.make_jaxpr(function)(*args)
    flat = jax.make_jaxpr(functools.partial(_flat, whole))(*args)
    jaxpr = flat.jaxpr
    there = {var for var, one in zip(jaxpr.invars, again, strict=True) if one} | {*jaxpr.constvars}
    wanted, given = [True] * len(awaited), new or [False] * len(args)
    scope = _Scope(jaxpr, awaited, wanted, given, there, at_once=new is not None)
    kept = [key for key in scope.reads if key not in there]
    scope.settle([not one for one in scope.is_late], kept)
    outs = list(zip(jaxpr.outvars, scope.is_late, strict=True))

    def early(*inputs: Array) -> list[Array]:
        known = _Values(zip([*jaxpr.constvars, *jaxpr.invars], [*flat.consts, *inputs], strict=True))
        scope.run_early(known)
        return [*(known.of(atom) for atom, late in outs if not late), *(known[key] for key in kept)]

    def late(*inputs: Array) -> list[Array]:
        own = [var for var, one in zip(jaxpr.invars, again, strict=True) if one]
        known = _Values(zip([*jaxpr.constvars, *own, *kept], [*flat.consts, *inputs], strict=True))
        scope.run_late(known)
        return [known.of(atom) for atom, one in outs if one]

    first = jax.make_jaxpr(early)(*args)
    residuals = tuple(
        jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        for aval in first.out_avals[len(outs) - sum(scope.is_late) :]
    )
    given = [arg for arg, one in zip(args, again, strict=True) if one]
    return Halves(
        early=first,
        late=jax.make_jaxpr(late)(*given, *residuals),
        is_late=tuple(scope.is_late),
        residuals=residuals,
    )


def _flat(closed: core.ClosedJaxpr, *inputs: Array) -> list[Array]:
    """Run a program with what calls and checkpoints run in their place."""
    jaxpr = closed.jaxpr
    known = _Values(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))
    for eqn in jaxpr.eqns:
        ins = [known.of(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        body = call_body(eqn) if name == "scan" or name in _CALLS else None
        with context_of(eqn):
            if body is None:
                outs = run(eqn, ins)
            elif name == "scan":
                outs = run_around(eqn, ins, lambda xs, body=body: _flat(body, *xs))
            else:
                if name in _CHECKPOINTS and eqn.params["prevent_cse"]:
                    # What is made again is not to be taken from where it was made before.
                    ins = lax.optimization_barrier(ins)
                outs = _flat(body, *ins)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [known.of(atom) for atom in jaxpr.outvars]


class _Values(dict[Any, Any]):
    """The values of variables, and of stacks of residuals."""

    def of(self, atom: Any) -> Any:
        """Return an atom's value."""
        return atom.val if isinstance(atom, core.Literal) else self[atom]


class _Scope:
    """The equations of a program in two, of outputs that are `awaited`, `wanted` or neither.

    `given` says which inputs are late, `there` are those that both can read; `at_once` all is late that what
    is awaited does not need, not from the first product on. `is_late` are the wanted outputs that are;
    `reads` is what the late equations read of the others, inputs included.
    """

    def __init__(
        self,
        jaxpr: core.Jaxpr,
        awaited: Sequence[bool],
        wanted: Sequence[bool],
        given: Sequence[bool],
        there: set[Any],
        at_once: bool,
    ) -> None:
        begun = _begun(jaxpr, awaited, given, at_once)
        self.jaxpr = jaxpr = _parted(jaxpr, begun)
        light = _light(jaxpr, there)
        first = _needed(jaxpr, awaited)[0]
        outs = zip(jaxpr.outvars, wanted, awaited, strict=True)
        self.is_late = [one and (_is_in(var, begun) or (at_once and not early)) for var, one, early in outs]
        live = set(_variables(jaxpr.outvars, self.is_late))
        self._loops: dict[int, _Loop] = {}
        self._late: list[int] = []
        self._early: list[int] = []
        self.live: set[Any] = set()
        for n in reversed(range(len(jaxpr.eqns))):
            eqn = jaxpr.eqns[n]
            outs = [var in live and (var in begun or var in light) for var in eqn.outvars]
            if not any(outs):
                continue
            self._late.append(n)
            if eqn.primitive.name == "scan":
                ins, own = ([_is_in(atom, begun) for atom in atoms] for atoms in (eqn.invars, eqn.outvars))
                loop = self._loops[n] = _Loop(
                    eqn, first.get(n, [False] * len(outs)), outs, ins, own, there | light, at_once
                )
                live.update(loop.reads)
            else:
                live.update(_variables(eqn.invars))
        self._late.reverse()
        made = {var for n in self._late for var in jaxpr.eqns[n].outvars if var in begun or var in light}
        order = {var: n for n, var in enumerate(self._variables_in_order())}
        self.reads = sorted(live - made, key=lambda key: order[key])

    def _variables_in_order(self) -> list[Any]:
        found = [*self.jaxpr.constvars, *self.jaxpr.invars]
        for n, eqn in enumerate(self.jaxpr.eqns):
            found += eqn.outvars
            found += self._loops[n].stacks if n in self._loops else []
        return found

    def settle(self, outs: Sequence[bool], more: Iterable[Any]) -> None:
        """Find the early equations, for some outputs and some variables more; `live` is all that is read."""
        live = {*_variables(self.jaxpr.outvars, outs), *more}
        self._early = []
        for n in reversed(range(len(self.jaxpr.eqns))):
            eqn, loop = self.jaxpr.eqns[n], self._loops.get(n)
            wanted = [var in live for var in eqn.outvars]
            stacked = loop is not None and not live.isdisjoint(loop.stacks)
            if not (any(wanted) or stacked or _acts(eqn)):
                continue
            self._early.append(n)
            live.update(_variables(eqn.invars, None if loop is None else loop.settle(wanted)))
        self._early.reverse()
        self.live = live

    def run_early(self, known: _Values) -> None:
        """Add to what is known what the early equations give."""
        self._run(self._early, known, _Loop.run_early)

    def run_late(self, known: _Values) -> None:
        """Add to what is known what the late equations give."""
        self._run(self._late, known, _Loop.run_late)

    def _run(self, some: Sequence[int], known: _Values, run_loop: Callable[[_Loop, _Values], None]) -> None:
        for n in some:
            eqn, loop = self.jaxpr.eqns[n], self._loops.get(n)
            with context_of(eqn):
                if loop is not None:
                    run_loop(loop, known)
                else:
                    outs = run(eqn, [known.of(atom) for atom in eqn.invars])
                    known.update(zip(eqn.outvars, outs, strict=True))


class _Loop:
    """A scan in two, of whose late results some are `wanted`; `given` and `late` are its inputs and results.

    `stacks` are what its first half keeps of each turn, `reads` what its second half reads outside, these
    included.
    """

    def __init__(
        self,
        eqn: core.JaxprEqn,
        awaited: Sequence[bool],
        wanted: Sequence[bool],
        given: Sequence[bool],
        late: Sequence[bool],
        there: set[Any],
        at_once: bool,
    ) -> None:
        parts = scan_parts(eqn)
        self._eqn, self._body = eqn, parts.body
        self._consts, self._carry = parts.num_consts, parts.num_carry
        body = parts.body.jaxpr
        pairs = enumerate(zip(body.invars, eqn.invars, strict=True))
        carries = range(self._consts, self._consts + self._carry)
        ins = [late[n - self._consts] if n in carries else one for n, one in enumerate(given)]
        same = {var for n, (var, atom) in pairs if n not in carries and _is_in(atom, there)}
        while True:
            self._scope = _Scope(body, awaited, wanted, ins, same | {*body.constvars}, at_once)
            reads = set(self._scope.reads)
            # Sums over turns that others are made of.
            read = [ins[n] and body.invars[n] in reads for n in carries]
            more = [one or (n < self._carry and read[n]) for n, one in enumerate(wanted)]
            if more == list(wanted):
                break
            wanted = more
        self._wanted = list(wanted)
        self._walked = [n for n in range(carries.stop, len(body.invars)) if body.invars[n] in reads]
        self._shared = [n for n in range(self._consts) if body.invars[n] in reads]
        self._summed = [n for n, one in enumerate(wanted[: self._carry]) if one]
        beside = {*body.constvars, *(body.invars[n] for n in (*self._walked, *self._shared))}
        beside |= {body.invars[self._consts + n] for n in self._summed}
        self._kept = [var for var in self._scope.reads if var not in beside]
        self.stacks: list[Any] = [_Stack() for _ in self._kept]
        atoms = [eqn.invars[n] for n in (*self._shared, *self._walked)]
        atoms += [eqn.invars[self._consts + n] for n in self._summed]
        self.reads = [*_variables(atoms), *self.stacks]

    def settle(self, wanted: Sequence[bool]) -> list[bool]:
        """Find the early equations for some of its results; return which inputs they read."""
        outs, body = list(wanted), self._body.jaxpr
        while True:
            self._scope.settle(outs, self._kept)
            live = [var in self._scope.live for var in body.invars]
            more = [one or (n < self._carry and live[self._consts + n]) for n, one in enumerate(outs)]
            if more == outs:
                break
            outs = more
        self._outs = outs
        for n, one in enumerate(outs[: self._carry]):
            live[self._consts + n] = one
        self._live = live
        return live

    def run_early(self, known: _Values) -> None:
        """Add to what is known the early results, and the stacks."""
        eqn, body = self._eqn, self._body.jaxpr
        first = self._consts + self._carry
        carried = [n for n, one in enumerate(self._outs[: self._carry]) if one]
        given = [n for n, one in enumerate(self._outs) if one and n >= self._carry]
        walked = [n for n in range(first, len(body.invars)) if self._live[n]]
        consts = [(body.invars[n], known.of(eqn.invars[n])) for n in range(self._consts) if self._live[n]]

        def turn(carry: list[Array], slices: list[Array]) -> Any:
            inner = _Values([*zip(body.constvars, self._body.consts, strict=True), *consts])
            inner.update(zip((body.invars[self._consts + n] for n in carried), carry, strict=True))
            inner.update(zip((body.invars[n] for n in walked), slices, strict=True))
            self._scope.run_early(inner)
            results = [inner.of(body.outvars[n]) for n in given]
            return [inner.of(body.outvars[n]) for n in carried], (results, [inner[v] for v in self._kept])

        start = [known.of(eqn.invars[self._consts + n]) for n in carried]
        last, (results, stacks) = self._scan(turn, start, [known.of(eqn.invars[n]) for n in walked])
        known.update(zip((eqn.outvars[n] for n in carried), last, strict=True))
        known.update(zip((eqn.outvars[n] for n in given), results, strict=True))
        known.update(zip(self.stacks, stacks, strict=True))

    def run_late(self, known: _Values) -> None:
        """Add to what is known the late results."""
        eqn, body = self._eqn, self._body.jaxpr
        given = [n for n, one in enumerate(self._wanted) if one and n >= self._carry]
        shared = [(body.invars[n], known.of(eqn.invars[n])) for n in self._shared]

        def turn(carry: list[Array], slices: Any) -> Any:
            inner = _Values([*zip(body.constvars, self._body.consts, strict=True), *shared])
            inner.update(zip((body.invars[self._consts + n] for n in self._summed), carry, strict=True))
            inner.update(zip((body.invars[n] for n in self._walked), slices[0], strict=True))
            inner.update(zip(self._kept, slices[1], strict=True))
            self._scope.run_late(inner)
            return [inner.of(body.outvars[n]) for n in self._summed], [
                inner.of(body.outvars[n]) for n in given
            ]

        start = [known.of(eqn.invars[self._consts + n]) for n in self._summed]
        slices = [known.of(eqn.invars[n]) for n in self._walked], [known[key] for key in self.stacks]
        last, results = self._scan(turn, start, slices)
        known.update(zip((eqn.outvars[n] for n in self._summed), last, strict=True))
        known.update(zip((eqn.outvars[n] for n in given), results, strict=True))

    def _scan(self, turn: Callable[..., Any], start: Any, slices: Any) -> Any:
        how = self._eqn.params
        return lax.scan(
            turn, start, slices, length=how["length"], reverse=how["reverse"], unroll=how["unroll"]
        )


class _Stack:
    """Stands for what one variable of a scan's body is in all of its turns."""


def _begun(jaxpr: core.Jaxpr, awaited: Sequence[bool], given: Sequence[bool], at_once: bool) -> set[Any]:
    """Return the variables that are late: products that nothing awaited needs, and what is made of these."""
    first = _needed(jaxpr, awaited)[0]
    begun = {var for var, one in zip(jaxpr.invars, given, strict=True) if one}
    for n, eqn in enumerate(jaxpr.eqns):
        ins = [_is_in(atom, begun) for atom in eqn.invars]
        if eqn.primitive.name == "scan":
            outs = _begun_in_loop(eqn, first.get(n, [False] * len(eqn.outvars)), ins, at_once)
        elif eqn.primitive.name == _BARRIER:
            outs = [one or (at_once and n not in first) for one in ins]
        else:
            outs = [n not in first and (at_once or any(ins) or _is_product(eqn))] * len(eqn.outvars)
        begun.update(_variables(eqn.outvars, outs))
    return begun


def _parted(jaxpr: core.Jaxpr, begun: set[Any]) -> core.Jaxpr:
    """Return a program in which what waits for one another is early or late, and waits for no other."""
    eqns: list[core.JaxprEqn] = []
    for eqn in jaxpr.eqns:
        late = [_is_in(atom, begun) for atom in eqn.invars]
        if eqn.primitive.name != _BARRIER or all(late) or not any(late):
            eqns.append(eqn)
            continue
        for half in (False, True):
            some = [n for n, one in enumerate(late) if one == half]
            eqns.append(
                eqn.replace(invars=[eqn.invars[n] for n in some], outvars=[eqn.outvars[n] for n in some])
            )
    return with_inputs(
        jaxpr, constvars=jaxpr.constvars, invars=jaxpr.invars, eqns=eqns, outvars=jaxpr.outvars
    )


def _light(jaxpr: core.Jaxpr, there: set[Any]) -> set[Any]:
    """Return what little work makes of nothing else than what is there."""
    found: set[Any] = set()
    for eqn in jaxpr.eqns:
        atoms = _variables(eqn.invars)
        if eqn.primitive.name in _LIGHT - {_BARRIER} and all(
            atom in there or atom in found for atom in atoms
        ):
            found.update(eqn.outvars)
    return found


def _begun_in_loop(
    eqn: core.JaxprEqn, awaited: Sequence[bool], given: Sequence[bool], at_once: bool
) -> list[bool]:
    parts, ins = scan_parts(eqn), list(given)
    while True:
        begun = _begun(parts.body.jaxpr, awaited, ins, at_once)
        outs = [_is_in(atom, begun) for atom in parts.body.jaxpr.outvars]
        # What a turn begins with may be late in the first turn alone.
        outs = [one or (n < parts.num_carry and ins[parts.num_consts + n]) for n, one in enumerate(outs)]
        more = list(ins)
        more[parts.num_consts : parts.num_consts + parts.num_carry] = outs[: parts.num_carry]
        if more == ins:
            return outs
        ins = more


def _needed(jaxpr: core.Jaxpr, outs: Sequence[bool]) -> tuple[dict[int, list[bool]], set[Any]]:
    """Return which results of which equations some outputs need, and all variables that are read for them."""
    live, found = set(_variables(jaxpr.outvars, outs)), {}
    for n in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[n]
        wanted, reads = [var in live for var in eqn.outvars], None
        if not any(wanted) and not _acts(eqn):
            continue
        if eqn.primitive.name == "scan":
            wanted, reads = _needed_in_loop(eqn, wanted)
        elif eqn.primitive.name == _BARRIER:
            reads = wanted
        found[n] = wanted
        live.update(_variables(eqn.invars, reads))
    return found, live


def _needed_in_loop(eqn: core.JaxprEqn, wanted: list[bool]) -> tuple[list[bool], list[bool]]:
    parts = scan_parts(eqn)
    body, first = parts.body.jaxpr, parts.num_consts
    while True:
        live = _needed(body, wanted)[1]
        more = [
            one or (n < parts.num_carry and body.invars[first + n] in live) for n, one in enumerate(wanted)
        ]
        if more == wanted:
            break
        wanted = more
    reads = [var in live for var in body.invars]
    reads[first : first + parts.num_carry] = wanted[: parts.num_carry]
    return wanted, reads


def _is_product(eqn: core.JaxprEqn) -> bool:
    name = eqn.primitive.name
    return name in _PRODUCTS or name in _KERNELS or any(map(_has_product, core.jaxprs_in_params(eqn.params)))


def _has_product(jaxpr: core.Jaxpr) -> bool:
    return any(map(_is_product, jaxpr.eqns))


def _acts(eqn: core.JaxprEqn) -> bool:
    """Whether an equation does something besides giving results."""
    if eqn.primitive.name in _ACTING:
        return True
    return any(_acts(inner) for jaxpr in core.jaxprs_in_params(eqn.params) for inner in jaxpr.eqns)


def _variables(atoms: Sequence[Any], which: Sequence[bool] | None = None) -> list[Any]:
    flags = [True] * len(atoms) if which is None else which
    pairs = zip(atoms, flags, strict=True)
    return [atom for atom, one in pairs if one and not isinstance(atom, core.Literal)]


def _is_in(atom: Any, found: set[Any]) -> bool:
    return not isinstance(atom, core.Literal) and atom in found
