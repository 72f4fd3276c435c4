"""How gradients of products and of look-ups are taken: as JAX does, or in the type that a GPU is fast in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...hardware.topology import Topology
from ...ops.attention import attention_call
from ...ops.gradients import WORDS, is_short, widens
from ...program.lookups import looks_up_rows
from ...program.program import Equation, Program, Scope

# What may be declared: what pays on the chip, or as JAX takes them.
AUTO, PLAIN = "auto", "jax"
CHOICES = (AUTO, PLAIN)


def choose(program: Program, topology: Topology, declared: str = AUTO) -> Mapping[str, Mapping[str, Any]]:
    """Return a Plan's ``kernels`` for gradients in `program`; empty where they are as JAX takes them.

    TPUs multiply in bfloat16 what they are given at default precision, and sort a look-up's rows.
    """
    if declared == PLAIN or topology.chip.platform != "gpu":
        return {}
    found = set()
    for equation in _outside_attention(program.scope):
        if widens(equation.eqn):
            found.add("products")
        elif looks_up_rows(equation.eqn):
            aval: Any = equation.eqn.invars[0].aval
            if is_short(aval.dtype):
                found.add("lookups")
    return {"gradients": {key: word for key, word in WORDS.items() if key in found}} if found else {}


def _outside_attention(scope: Scope) -> Iterator[Equation]:
    """Walk the equations but for those of attention, whose kernels take their own gradients."""
    for equation in scope.equations:
        yield equation
        for inner in () if attention_call(equation.eqn) is not None else equation.scopes:
            yield from _outside_attention(inner)
