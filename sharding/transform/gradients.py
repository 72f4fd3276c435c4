"""Gradients of products and look-ups as a plan says, where that is not as JAX takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ops.gradients import is_short, looked_up, product, widens
from ..program.jaxpr import Go, Pass
from ..program.lookups import looks_up_rows
from ..program.program import Equation


class Gradients(Pass):
    """Takes gradients as a plan's ``kernels["gradients"]`` says; the last pass, on what is computed with.

    Look-ups in tables that are cut over devices are `transform.constrain`'s.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._products, self._lookups = "products" in settings, "lookups" in settings

    def visit(self, equation: Equation, inputs: list[Any], go: Go) -> Sequence[Any]:
        """Run a product or a look-up with gradients of its own."""
        eqn = equation.eqn
        if self._products and widens(eqn):
            return [product(eqn, *inputs)]
        if self._lookups and looks_up_rows(eqn) and is_short(inputs[0].dtype):
            return [looked_up(eqn, *inputs)]
        return go(inputs)
