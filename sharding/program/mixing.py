"""Whether a loss mixes examples, so that it cannot be computed a part of the batch at a time.

Each array is followed from the data to the loss as one of: free of the data; rows, one per example; a mean
over examples (a sum divided by their number); a ratio of sums (a weighted mean); a sum over examples. A mean
at the end is fine, since means of parts combine.
A sum that comes back to the rows (batch normalisation), that goes through something that is not linear (a
product of two means), or rows that meet otherwise (sorted, ranked, compared in pairs) is not.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jax.extend import core

from ..errors import UserError, nearest
from .jaxpr import scan_parts
from .primitives import Trait, primitives
from .program import Dims, Equation, Factor, Program, Scope


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """An equation where examples meet, and how."""

    equation: int
    primitive: str
    where: str
    reason: str


Reduction = Literal["mean", "ratio", "sum", "none"]


class _State(enum.IntEnum):
    FREE = 0
    ROWS = 1
    MEAN = 2
    RATIO = 3
    SUM = 4


_REDUCTIONS: dict[_State, Reduction] = {
    _State.FREE: "none",
    _State.ROWS: "sum",
    _State.MEAN: "mean",
    _State.RATIO: "ratio",
    _State.SUM: "sum",
}

_LINEAR = primitives(Trait.LINEAR) | primitives(Trait.PICKING)
_BILINEAR = primitives(Trait.BILINEAR)
# Guards against an empty count (``maximum(count, 1)``) and questions about one (``count > 0``).
_GUARDS = primitives(Trait.GUARD)
_QUESTIONS = primitives(Trait.QUESTION)


def batch_mixing(program: Program, dim: int | str | None = None) -> tuple[Mixing, ...]:
    """List the equations through which one example's loss comes to depend on another's.

    `dim` is a dim's id or name; by default every dim that leads an array of the data (`Program.data_dims`).
    The loss is the program's first result; what does not reach it (metrics, running averages) does not
    count. The answer errs on the side of caution: an operation that is not understood mixes.
    """
    ids = _ids(program, dim)
    found: dict[int, Mixing] = {}
    for one in ids:
        for mixing in _Follow(program, one).run():
            found.setdefault(mixing.equation, mixing)
    return tuple(found[index] for index in sorted(found))


def batch_reduction(program: Program) -> Reduction:
    """Return how the loss comes from its examples: what the losses of equal parts have to be weighed by.

    ``mean``: a sum divided by the number of examples, or of their elements; ``ratio``: by a sum over the
    data, such as how many targets count; ``sum``: not divided by either, as far as can be seen; ``none``: the
    loss does not depend on the data, or there is no batch.
    """
    states = [_Follow(program, dim).loss() for dim in program.data_dims]
    return _REDUCTIONS[max(states, default=_State.FREE)]


def _ids(program: Program, dim: int | str | None) -> tuple[int, ...]:
    if dim is None:
        return program.data_dims
    if isinstance(dim, str):
        if dim not in program.by_name:
            raise UserError(f"the program has no dimension {dim!r}; {nearest(dim, program.by_name)}")
        return (program.by_name[dim].id,)
    return (dim,)


def _has(dims: Dims, dim: int) -> bool:
    return any(dim in composition for composition in dims)


class _Follow:
    """Follows the states of arrays through a program, for one dim."""

    def __init__(self, program: Program, dim: int) -> None:
        self._program = program
        self._dim = dim
        self._found: dict[int, str] = {}
        self._live = _live_equations(program)

    def loss(self) -> _State:
        """Return the state of the program's first result."""
        arguments = [
            _State.ROWS if _has(argument.dims, self._dim) else _State.FREE
            for argument in self._program.arguments
        ]
        return next(iter(self._scope(self._program.scope, arguments)), _State.FREE)

    def run(self) -> list[Mixing]:
        self.loss()
        if not self._found:
            return []
        located = {e.index: (e, where) for e, where in self._program.located()}
        return [
            Mixing(
                equation=index, primitive=located[index][0].primitive, where=located[index][1], reason=reason
            )
            for index, reason in self._found.items()
        ]

    def _scope(self, scope: Scope, arguments: Sequence[_State]) -> list[_State]:
        states: dict[Any, _State] = dict(zip(scope.jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> _State:
            return _State.FREE if isinstance(atom, core.Literal) else states.get(atom, _State.FREE)

        for equation in scope.equations:
            inputs = [read(atom) for atom in equation.eqn.invars]
            outputs = self._control(equation, inputs) if equation.scopes else self._leaf(equation, inputs)
            states.update(zip(equation.eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in scope.jaxpr.outvars]

    def _control(self, equation: Equation, inputs: list[_State]) -> list[_State]:
        if equation.primitive == "scan":
            return self._scan(equation, inputs)
        if equation.primitive == "cond":
            arms = [self._scope(arm, inputs[1:]) for arm in equation.scopes]
            return [max(states) for states in zip(*arms, strict=True)]
        if equation.primitive == "while":
            body = equation.scopes[-1]
            carried = len(body.jaxpr.outvars)
            consts = inputs[: len(inputs) - carried][-(len(body.jaxpr.invars) - carried) :]
            consts = consts if len(body.jaxpr.invars) > carried else []
            return self._settle(body, consts, inputs[-carried:], [], carried)[:carried]
        return self._scope(equation.scopes[0], inputs)

    def _scan(self, equation: Equation, inputs: list[_State]) -> list[_State]:
        parts = scan_parts(equation.eqn)
        consts = inputs[: parts.num_consts]
        carry = inputs[parts.num_consts : parts.num_consts + parts.num_carry]
        stacked = inputs[parts.num_consts + parts.num_carry :]
        if parts.num_carry and any(self._dim in factor.dims for factor in equation.factors):
            self._mix(equation, "it walks the examples one after another and carries a state")
        return self._settle(equation.scopes[0], consts, carry, stacked, parts.num_carry)

    def _settle(
        self, body: Scope, consts: list[_State], carry: list[_State], stacked: list[_State], carried: int
    ) -> list[_State]:
        """Run a loop's body until what it carries no longer changes state."""
        while True:
            outputs = self._scope(body, [*consts, *carry, *stacked])
            joined = [max(pair) for pair in zip(carry, outputs[:carried], strict=True)]
            if joined == carry:
                return outputs
            carry = joined

    def _leaf(self, equation: Equation, inputs: list[_State]) -> list[_State]:
        rows = {n for n, state in enumerate(inputs) if state is _State.ROWS}
        sums = {n for n, state in enumerate(inputs) if state >= _State.MEAN}
        if not rows and not sums:
            return [_State.FREE] * len(equation.outs)
        mine = [factor for factor in equation.factors if self._dim in factor.dims]
        if rows:
            self._check_rows(equation, mine, rows)
        summed = any(factor.kind == "contract" for factor in mine)
        outputs = []
        for dims in equation.outs:
            if sums and _has(dims, self._dim):
                self._mix(equation, "something summed over the examples comes back to each of them")
            has_rows = rows and (_has(dims, self._dim) or not summed)
            outputs.append(_State.ROWS if has_rows else _State.SUM if summed and rows else None)
        if None not in outputs or (rows and not sums):
            return [_State.SUM if state is None else state for state in outputs]
        after = self._after_sum(equation, inputs, sums)
        return [after if state is None else state for state in outputs]

    def _check_rows(self, equation: Equation, mine: list[Factor], rows: set[int]) -> None:
        for factor in mine:
            touched = any(operand in rows for operand, _ in factor.ins)
            if touched and factor.kind not in ("map", "contract"):
                self._mix(equation, _HOW[factor.kind].format(equation.primitive))
        places = [sum(self._dim in composition for composition in dims) for dims in equation.outs]
        before = [sum(self._dim in composition for composition in equation.ins[n]) for n in rows]
        if max(places, default=0) > 1 and max(before, default=0) < 2:
            self._mix(equation, "it compares every example with every other")

    def _after_sum(self, equation: Equation, inputs: list[_State], sums: set[int]) -> _State:
        """Return the state of a result computed from sums over examples, which are no longer rows."""
        name = equation.primitive
        top = max(inputs)
        if name in _QUESTIONS:
            return _State.FREE
        if name in _LINEAR or (name in _GUARDS and len(sums) == 1):
            return top
        if name in _BILINEAR and len(sums) == 1:
            return self._scaled(equation, top, inverse=True)
        if name == "div" and sums == {0}:
            return self._scaled(equation, top, inverse=False)
        if name == "div" and inputs in ([_State.SUM, _State.SUM], [_State.MEAN, _State.MEAN]):
            return _State.RATIO
        self._mix(equation, f"{name} of a sum over the examples is not the sum of its parts")
        return top

    def _scaled(self, equation: Equation, state: _State, *, inverse: bool) -> _State:
        """Return MEAN if a sum is divided by how many examples or elements there are."""
        constants = [atom.val for atom in equation.eqn.invars if isinstance(atom, core.Literal)]
        if state is not _State.SUM or len(constants) != 1 or not constants[0]:
            return state
        count = 1 / float(constants[0]) if inverse else float(constants[0])
        each = count / self._program.dims[self._dim].size
        return _State.MEAN if round(each) >= 1 and abs(each / round(each) - 1) < 1e-5 else state

    def _mix(self, equation: Equation, reason: str) -> None:
        if equation.index in self._live:
            self._found.setdefault(equation.index, reason)


_HOW = {
    "reduce": "{} picks one among the examples",
    "index": "{} looks examples up at computed places",
    "group": "{} groups examples",
    "resize": "{} moves examples past each other",
    "window": "{} slides a window over the examples",
    "scan": "{} walks the examples one after another",
    "whole": "{} needs all examples together",
}


def _live_equations(program: Program) -> set[int]:
    """Return the indices of the equations that the first result depends on."""
    live: set[int] = set()
    outs = program.scope.jaxpr.outvars
    if outs:
        _mark(program.scope, [True] + [False] * (len(outs) - 1), live)
    return live


def _mark(scope: Scope, wanted: Iterable[bool], live: set[int]) -> None:
    needed = {atom for atom, want in zip(scope.jaxpr.outvars, wanted, strict=True) if want and _is_var(atom)}
    for equation in reversed(scope.equations):
        want = [var in needed for var in equation.eqn.outvars]
        if not any(want):
            continue
        live.add(equation.index)
        needed.update(atom for atom in equation.eqn.invars if _is_var(atom))
        loops = equation.primitive in ("scan", "while")
        for inner in equation.scopes:
            count = len(inner.jaxpr.outvars)
            _mark(inner, want if not loops and len(want) == count else [True] * count, live)


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)
