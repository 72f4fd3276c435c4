"""Pieces of a traced program: the equations between some of its values and others, run by themselves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from .jaxpr import Pass, Rewriter
from .program import Equation, Program


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ProgramPiece:
    """The equations of a program that give `wanted`, atoms of its outermost scope, where `known` are given.

    `at` is run in place of the equation of its index, on `operands` of its own for those numbers.
    """

    program: Program
    wanted: tuple[Any, ...]
    known: tuple[Any, ...] = ()
    at: Equation | None = None
    operands: tuple[int, ...] = ()

    @property
    def reads(self) -> set[int]:
        """The numbers of the program's arguments that are read."""
        return {n for n, var in enumerate(self.program.scope.jaxpr.invars) if var in self._needed[1]}

    @property
    def reads_known(self) -> set[Any]:
        """Those of `known` that are read, or wanted as they are."""
        read = {atom for one in self._needed[0] for atom in one.eqn.invars if not _is_number(atom)}
        read.update(atom for atom in self.wanted if not _is_number(atom))
        return read.intersection(self.known)

    @functools.cached_property
    def _needed(self) -> tuple[tuple[Equation, ...], set[Any]]:
        stop = set(self.known)
        live = {atom for atom in self.wanted if not _is_number(atom)} - stop
        found: list[Equation] = []
        for equation in reversed(self.program.scope.equations):
            if live.isdisjoint(equation.eqn.outvars):
                continue
            own = self.at is not None and equation.index == self.at.index
            found.append(self.at if own and self.at is not None else equation)
            given = self.operands if own else ()
            atoms = [atom for n, atom in enumerate(equation.eqn.invars) if n not in given]
            live.update({atom for atom in atoms if not _is_number(atom)} - stop)
        return tuple(reversed(found)), live

    def run(
        self,
        passes: Sequence[Pass],
        inputs: Sequence[Any],
        known: Sequence[Any] = (),
        operands: Sequence[Any] = (),
    ) -> list[Any]:
        """Run it as `passes` say on the program's `inputs`; those that it does not read may be None.

        The passes end what the program itself gives, and nothing that is given in its middle.
        """
        scope, rewriter = self.program.scope, Rewriter(passes)
        taken = list(inputs)
        for one in reversed(passes):
            taken = one.begin(scope, taken)
        values: dict[Any, Any] = dict(zip(scope.jaxpr.constvars, self.program.jaxpr.consts, strict=True))
        values.update(zip(scope.jaxpr.invars, taken, strict=True))
        values.update(zip(self.known, known, strict=True))
        own = dict(zip(self.operands, operands, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if _is_number(atom) else values[atom]

        for equation in self._needed[0]:
            given = own if equation is self.at else {}
            atoms = enumerate(equation.eqn.invars)
            outputs = rewriter.run(equation, [given[n] if n in given else read(atom) for n, atom in atoms])
            values.update(zip(equation.eqn.outvars, outputs, strict=True))
        results = [read(atom) for atom in self.wanted]
        if self.wanted == tuple(scope.jaxpr.outvars):
            for one in reversed(passes):
                results = one.end(scope, results)
        return results


def _is_number(atom: Any) -> bool:
    return isinstance(atom, core.Literal)


def of_length(equation: Equation, length: int) -> Equation:
    """Return a scan of another length."""
    params = {**equation.eqn.params, "length": length}
    return dataclasses.replace(equation, eqn=equation.eqn.replace(params=params))
