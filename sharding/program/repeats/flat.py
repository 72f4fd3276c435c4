"""A program as a list of equations over numbered values: jitted calls are opened, all else kept.

Numbers in place of variables let one jaxpr that is called many times stand many times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from ..jaxpr import closed
from ..op_rules import users_rule
from .keys import Keys, Written

# Calls of this name are operations of our own, of which costs and kernels know more than their programs say.
OWN = "meshwright_"


@dataclasses.dataclass(eq=False, slots=True)
class FlatEquation:
    """An equation with its operands and results by number; see `Keyed` for the rest."""

    eqn: core.JaxprEqn
    ins: tuple[int | Written, ...]
    outs: tuple[int, ...]
    key: int
    literals: tuple[Written, ...]
    works: int

    @property
    def name(self) -> str:
        """The primitive's."""
        return self.eqn.primitive.name


@dataclasses.dataclass(eq=False)
class FlatProgram:
    """A program laid out. `avals` and `producer` (the equation that gives it, or -1) are by value."""

    eqns: list[FlatEquation]
    ins: list[int]
    consts: list[tuple[int, Any]]
    outs: list[int | Written]
    avals: list[Any]
    producer: list[int] = dataclasses.field(default_factory=list)


def is_opened(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` is a jitted call that says nothing but what it runs."""
    params = eqn.params
    if eqn.primitive.name != "jit" or str(params.get("name", "")).startswith(OWN):
        return False
    told = (*params.get("in_shardings", ()), *params.get("out_shardings", ()))
    return all(type(one).__name__ == "UnspecifiedValue" for one in told) and not users_rule("jit", params)


def flatten(program: core.ClosedJaxpr, keys: Keys) -> FlatProgram:
    """Lay a program out."""
    return _Flattening(keys).read(program)


class _Flattening:
    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._keyed: dict[int, Any] = {}
        self._flat = FlatProgram([], [], [], [], [])

    def read(self, program: core.ClosedJaxpr) -> FlatProgram:
        flat = self._flat
        flat.ins = [self._new(var.aval) for var in program.jaxpr.invars]
        flat.outs = self._scope(program, flat.ins)
        flat.producer = [-1] * len(flat.avals)
        for n, one in enumerate(flat.eqns):
            for value in one.outs:
                flat.producer[value] = n
        return flat

    def _new(self, aval: Any) -> int:
        self._flat.avals.append(aval)
        return len(self._flat.avals) - 1

    def _scope(self, program: core.ClosedJaxpr, ins: Sequence[int | Written]) -> list[int | Written]:
        env: dict[Any, int | Written] = dict(zip(program.jaxpr.invars, ins, strict=True))
        for var, const in zip(program.jaxpr.constvars, program.consts, strict=True):
            env[var] = number = self._new(var.aval)
            self._flat.consts.append((number, const))

        def read(atom: Any) -> int | Written:
            return Written(atom.val, atom.aval) if isinstance(atom, core.Literal) else env[atom]

        for eqn in program.jaxpr.eqns:
            operands = tuple([read(atom) for atom in eqn.invars])
            if is_opened(eqn):
                env.update(zip(eqn.outvars, self._scope(closed(eqn.params["jaxpr"]), operands), strict=True))
                continue
            outs = tuple([self._new(var.aval) for var in eqn.outvars])
            env.update(zip(eqn.outvars, outs, strict=True))
            keyed = self._keyed.get(id(eqn))
            if keyed is None:
                keyed = self._keyed[id(eqn)] = self._keys.equation(eqn)
            self._flat.eqns.append(FlatEquation(eqn, operands, outs, keyed.key, keyed.literals, keyed.works))
        return [read(atom) for atom in program.jaxpr.outvars]
