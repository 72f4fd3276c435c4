"""Products and look-ups worked out as a plan says, where that is not as JAX does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ops.arithmetic import is_short, looked_up, product, widens
from ..program.jaxpr import Go, Pass
from ..program.lookups import looks_up_rows
from ..program.program import Equation


class Arithmetic(Pass):
    """Works out what a plan's ``kernels["arithmetic"]`` names; the last pass, on what is computed with.

    Look-ups in tables that are cut over devices are `transform.constrain`'s.
    """

    def __init__(self, settings: Mapping[str, Any], devices: int) -> None:
        self._settings, self._shared = settings, devices > 1

    def visit(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        """Run a product or a look-up in the plan's way."""
        eqn = equation.eqn
        if widens(eqn):
            return [product(eqn, inputs[0], inputs[1], self._settings, shared=self._shared)]
        if "lookups" in self._settings and looks_up_rows(eqn) and is_short(inputs[0].dtype):
            return [looked_up(eqn, *inputs)]
        return go(inputs)
