"""What a program works out beside its loss: the new state of a loss that has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jax.extend import core

from .program import Equation, Program, Scope, walk_equations

# Where the new state stands in what such a loss returns: (loss, (aux, state)).
NEW_STATE = "1/1"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Aside:
    """What neither the loss nor its aux values depend on, so that only the new state does.

    `equations` are their indices; `outs` says of every result of the program, and of the jitted calls in it,
    whether it is such; `inputs` likewise of every argument of the program.
    """

    equations: frozenset[int]
    outs: Mapping[Scope, tuple[bool, ...]]
    inputs: tuple[bool, ...]


def aside(program: Program) -> Aside:
    """Return what of `program` the new state alone depends on: nothing where the loss has no state."""
    if not any(argument.is_state for argument in program.arguments):
        return Aside(equations=frozenset(), outs={}, inputs=(False,) * len(program.arguments))
    wanted = [row.path.split("/")[:2] != NEW_STATE.split("/") for row in program.results]
    needed: set[int] = set()
    outs: dict[Scope, tuple[bool, ...]] = {}
    read = _needed(program.scope, wanted, needed, outs)
    everything = {equation.index for equation in program.equations()}
    return Aside(equations=frozenset(everything - needed), outs=outs, inputs=tuple(not one for one in read))


def _needed(
    scope: Scope, wanted: Sequence[bool], needed: set[int], outs: dict[Scope, tuple[bool, ...]]
) -> list[bool]:
    """Note the equations that the `wanted` results of a scope need; return which of its inputs they need."""
    outs[scope] = tuple(not one for one in wanted)
    live: set[core.Var] = set()

    def note(atoms: Sequence[object], which: Sequence[bool]) -> None:
        pairs = zip(atoms, which, strict=True)
        live.update(atom for atom, one in pairs if one and isinstance(atom, core.Var))

    note(scope.jaxpr.outvars, wanted)
    for equation in reversed(scope.equations):
        given = [out in live for out in equation.eqn.outvars]
        if equation.primitive == "jit" and equation.scopes:
            taken = _needed(equation.scopes[0], given, needed, outs)
            if any(given):
                needed.add(equation.index)
            note(equation.eqn.invars, taken)
        elif any(given) or equation.eqn.effects:
            needed.update(_indices(equation))
            note(equation.eqn.invars, [True] * len(equation.eqn.invars))
    return [var in live for var in scope.jaxpr.invars]


def _indices(equation: Equation) -> set[int]:
    inner = (one.index for scope in equation.scopes for one in walk_equations(scope))
    return {equation.index, *inner}
