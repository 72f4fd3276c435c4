"""A traced program opened for reading: its jitted calls gone, every variable made in one place only.

Bodies of loops, checkpoints and arms of conditions are opened beside their equations, and what reaches them
unchanged from outside is known. Equations are kept as they are or copied, never run again, so that a program
of ten thousand is opened, and put together with some of it replaced, in tens of milliseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from ...ops.attention import attention_call
from ...ops.experts import experts_call
from ..jaxpr import again, branches, closed, inlined, scan_parts, with_inputs
from ..primitives import Trait, primitives

_CHECKPOINTS = primitives(Trait.CHECKPOINT)

# Gives the jaxpr that an equation is replaced by, and what that is to read, in the scope of the equation.
Made = tuple[core.ClosedJaxpr, Sequence[Any]]


@dataclasses.dataclass(eq=False, kw_only=True)
class Opened:
    """A jaxpr without jitted calls. `bodies` are those of an equation, by its id, each opened too.

    `outer` is the scope that the equation `at` stands in of which this is a body. `brought` are values of
    `outer` that the body reads besides its inputs, each with the variable that has it here.
    """

    jaxpr: core.Jaxpr
    consts: dict[core.Var, Any]
    invars: list[core.Var]
    outvars: list[Any]
    equations: list[core.JaxprEqn]
    bodies: dict[int, tuple[Opened, ...]]
    outer: Opened | None = None
    at: core.JaxprEqn | None = None
    brought: dict[Any, core.Var] = dataclasses.field(default_factory=dict)

    def scopes(self) -> Iterator[Opened]:
        """Walk this scope and those within."""
        yield self
        for bodies in self.bodies.values():
            for body in bodies:
                yield from body.scopes()


class Opening:
    """What opens a program: `top` is its scope, `maker` and `home` the equation and scope of each variable.

    `link` maps an input of a body to what it is outside, where that is the same each time the body runs.
    """

    def __init__(self, program: core.ClosedJaxpr) -> None:
        self.maker: dict[core.Var, core.JaxprEqn] = {}
        self.home: dict[core.Var, Opened] = {}
        self.link: dict[core.Var, Any] = {}
        self.top = self._open(program, None, None, [])

    def outside(self, atom: Any) -> Any:
        """Return the value that `atom` is, outside of the bodies that it is handed into."""
        while not isinstance(atom, core.Literal) and atom in self.link:
            atom = self.link[atom]
        return atom

    def bring(self, atom: Any, scope: Opened) -> Any:
        """Return `atom`, a value of `scope` or of one around it, as what it is in `scope`."""
        if isinstance(atom, core.Literal) or self.home[atom] is scope:
            return atom
        assert scope.outer is not None
        known = self.bring(atom, scope.outer)
        for var in scope.invars:
            if self.link.get(var) is known:
                return var
        if known not in scope.brought:
            var = scope.brought[known] = core.Var(known.aval)
            self.home[var], self.link[var] = scope, known
        return scope.brought[known]

    def _open(
        self, program: core.ClosedJaxpr, outer: Opened | None, at: core.JaxprEqn | None, linked: Sequence[Any]
    ) -> Opened:
        jaxpr = program.jaxpr
        env: dict[core.Var, Any] = {}
        scope = Opened(
            jaxpr=jaxpr, consts={}, invars=[], outvars=[], equations=[], bodies={}, outer=outer, at=at
        )
        for var in (*jaxpr.constvars, *jaxpr.invars):
            env[var] = self._own(var, scope)
        scope.invars = [env[var] for var in jaxpr.invars]
        scope.consts = {env[var]: one for var, one in zip(jaxpr.constvars, program.consts, strict=True)}
        self.link.update(zip(scope.invars, linked, strict=False))
        self._lay(jaxpr, env, scope, None)
        scope.outvars = [_of(env, atom) for atom in jaxpr.outvars]
        return scope

    def _own(self, var: core.Var, scope: Opened) -> core.Var:
        mine = core.Var(var.aval) if var in self.home else var
        self.home[mine] = scope
        return mine

    def _lay(
        self, jaxpr: core.Jaxpr, env: dict[core.Var, Any], scope: Opened, call: core.JaxprEqn | None
    ) -> None:
        for eqn in jaxpr.eqns:
            inputs = [_of(env, atom) for atom in eqn.invars]
            body = closed(eqn.params["jaxpr"]) if _opens(eqn, scope) else None
            if body is not None:
                inner: dict[core.Var, Any] = dict(zip(body.jaxpr.invars, inputs, strict=True))
                for var, one in zip(body.jaxpr.constvars, body.consts, strict=True):
                    inner[var] = self._own(var, scope)
                    scope.consts[inner[var]] = one
                self._lay(body.jaxpr, inner, scope, inlined(eqn, call))
                env.update(
                    (var, _of(inner, a)) for var, a in zip(eqn.outvars, body.jaxpr.outvars, strict=True)
                )
                continue
            outputs = [var if _dropped(var) else self._own(var, scope) for var in eqn.outvars]
            env.update(zip(eqn.outvars, outputs, strict=True))
            laid = inlined(eqn, call)
            if any(a is not b for a, b in zip((*eqn.invars, *eqn.outvars), (*inputs, *outputs), strict=True)):
                laid = laid.replace(invars=inputs, outvars=outputs)
            scope.equations.append(laid)
            self.maker.update((var, laid) for var in outputs)
            self._bodies(laid, scope)

    def _bodies(self, eqn: core.JaxprEqn, scope: Opened) -> None:
        name = eqn.primitive.name
        if name in _CHECKPOINTS:
            found = [(closed(eqn.params["jaxpr"]), eqn.invars)]
        elif name == "cond":
            found = [(arm, eqn.invars[1:]) for arm in branches(eqn)]
        elif name == "scan":
            parts = scan_parts(eqn)
            found = [(parts.body, eqn.invars[: parts.num_consts])]
        else:
            return
        scope.bodies[id(eqn)] = tuple(self._open(body, scope, eqn, linked) for body, linked in found)


def _of(env: dict[core.Var, Any], atom: Any) -> Any:
    return atom if isinstance(atom, core.Literal) else env.get(atom, atom)


def _dropped(var: Any) -> bool:
    return isinstance(var, core.DropVar)


def _opens(eqn: core.JaxprEqn, scope: Opened) -> bool:
    """Whether an equation is a jitted call to be opened: constants of one stay at the top of a program."""
    if eqn.primitive.name != "jit" or attention_call(eqn) is not None or experts_call(eqn) is not None:
        return False
    return scope.outer is None or not closed(eqn.params["jaxpr"]).consts


class Rebuilding:
    """Puts a program together again, with `made` in place of equations, each by its id.

    What only replaced equations have read is left out.
    """

    def __init__(self, opening: Opening, made: dict[int, Callable[[], Made]]) -> None:
        self._opening = opening
        self._made = made
        changed = {id(scope) for scope in opening.top.scopes() if any(id(e) in made for e in scope.equations)}
        self._changed: set[int] = set()
        for scope in opening.top.scopes():
            one: Opened | None = scope if id(scope) in changed else None
            while one is not None:
                self._changed.add(id(one))
                one = one.outer

    def program(self) -> core.ClosedJaxpr:
        """Return the whole program."""
        top = self._opening.top
        return self._closed(top, top.invars)

    def _closed(self, scope: Opened, invars: Sequence[core.Var]) -> core.ClosedJaxpr:
        equations = self._equations(scope)
        read = {atom for eqn in equations for atom in eqn.invars if not isinstance(atom, core.Literal)}
        read.update(atom for atom in scope.outvars if not isinstance(atom, core.Literal))
        consts = {var: one for var, one in scope.consts.items() if var in read}
        jaxpr = with_inputs(
            scope.jaxpr, constvars=list(consts), invars=list(invars), eqns=equations, outvars=scope.outvars
        )
        return core.ClosedJaxpr(jaxpr, list(consts.values()))

    def _equations(self, scope: Opened) -> list[core.JaxprEqn]:
        laid: list[core.JaxprEqn] = []
        for eqn in scope.equations:
            if id(eqn) in self._made:
                laid += inserted(*self._made[id(eqn)](), eqn)
            elif any(id(body) in self._changed for body in scope.bodies.get(id(eqn), ())):
                laid += self._with_bodies(eqn, scope.bodies[id(eqn)])
            else:
                laid.append(eqn)
        needed = {atom for atom in scope.outvars if not isinstance(atom, core.Literal)}
        kept = []
        for eqn in reversed(laid):
            if eqn.effects or not needed.isdisjoint(eqn.outvars):
                kept.append(eqn)
                needed.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
        return kept[::-1]

    def _with_bodies(self, eqn: core.JaxprEqn, bodies: Sequence[Opened]) -> list[core.JaxprEqn]:
        """Return the equations of `eqn` with its bodies as they are now, reading what they read now."""
        equations = [self._equations(body) for body in bodies]
        brought: dict[Any, None] = {outer: None for body in bodies for outer in body.brought}
        runs = []
        for body, inside in zip(bodies, equations, strict=True):
            extra = [body.brought.get(outer) or core.Var(outer.aval) for outer in brought]
            jaxpr = with_inputs(
                body.jaxpr,
                constvars=list(body.consts),
                invars=[*body.invars, *extra],
                eqns=inside,
                outvars=body.outvars,
            )
            runs.append(core.ClosedJaxpr(jaxpr, list(body.consts.values())))
        return inserted(*again(eqn, runs, list(brought)), eqn)


def inserted(program: core.ClosedJaxpr, inputs: Sequence[Any], eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Return the equations of `program` on `inputs`, giving the results of `eqn` and told as it is."""
    if program.consts:
        raise ValueError("a program that is put in another's place has no constants")
    env: dict[core.Var, Any] = dict(zip(program.jaxpr.invars, inputs, strict=True))
    results = dict(zip(program.jaxpr.outvars, eqn.outvars, strict=True))
    made = []
    for one in program.eqns:
        outputs = [results.get(var) or core.Var(var.aval) for var in one.outvars]
        env.update(zip(one.outvars, outputs, strict=True))
        made.append(
            one.replace(
                invars=[_of(env, atom) for atom in one.invars],
                outvars=outputs,
                source_info=eqn.source_info,
                ctx=eqn.ctx,
            )
        )
    return made


def shapes(atoms: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Return atoms as what `jax.make_jaxpr` takes."""
    return [
        jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype, weak_type=getattr(a.aval, "weak_type", False))
        for a in atoms
    ]
