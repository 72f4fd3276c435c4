"""The experts of a program's mixtures: dims that calls of `ops.experts` work through by groups of rows."""

from __future__ import annotations

from ..ops.experts import experts_call
from .program import Program


def experts_dims(program: Program) -> tuple[int, ...]:
    """Return the dims that the matrices of calls of `ops.experts` lead with.

    An axis that cuts the rows may cut them too: tokens are exchanged over it.
    """
    calls = (equation for equation in program.equations() if experts_call(equation.eqn) is not None)
    return tuple(dict.fromkeys(equation.ins[3][0][0] for equation in calls if equation.ins[3][0]))
