"""Products worked out as a plan says, where that is not as JAX does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ops.arithmetic import product, widens
from ..program.jaxpr import Go, Pass
from ..program.program import Equation


class Arithmetic(Pass):
    """Works out products as a plan's ``kernels["arithmetic"]`` says; the last pass, on what is computed with.

    Look-ups are `transform.constrain`'s, which knows where their tables and ids lie.
    """

    def __init__(self, settings: Mapping[str, Any], devices: int) -> None:
        self._settings, self._shared = settings, devices > 1

    def visit(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        """Run a product or a look-up in the plan's way."""
        eqn = equation.eqn
        if widens(eqn):
            return [product(eqn, inputs[0], inputs[1], self._settings, shared=self._shared)]
        return go(inputs)
