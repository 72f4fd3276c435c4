"""How products and look-ups of 16 bits are worked out: as JAX does, or as a GPU is fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...hardware.topology import Topology
from ...ops.arithmetic import WORDS, is_short, odd_width, widens
from ...ops.attention import attention_call
from ...program.lookups import looks_up_rows
from ...program.program import Equation, Program, Scope

# What may be declared: what pays on the chip, or as JAX does.
AUTO, PLAIN = "auto", "jax"
CHOICES = (AUTO, PLAIN)


def choose(
    program: Program,
    topology: Topology,
    declared: str = AUTO,
    dims: Mapping[int, tuple[str, ...]] | None = None,
) -> Mapping[str, Any]:
    """Return a Plan's ``kernels["arithmetic"]`` for `program`; empty where all is as JAX does it.

    `dims` are the axes of a layout's dimensions: what is cut over devices is not padded. TPUs multiply in
    bfloat16 what they are given at default precision, sort a look-up's rows, and pad tiles themselves.
    """
    if declared == PLAIN or topology.chip.platform != "gpu":
        return {}
    found = set()
    for equation in _outside_attention(program.scope):
        if widens(equation.eqn):
            found.add("products")
            odd = odd_width(equation.eqn)
            if odd is not None:
                side, dimension = odd
                of_width = equation.ins[side][dimension]
                cut = dims is not None and any(dims.get(dim) for dim in of_width)
                found.add("cut" if cut else "multiple")
        elif looks_up_rows(equation.eqn):
            aval: Any = equation.eqn.invars[0].aval
            if is_short(aval.dtype):
                found.add("lookups")
    if "cut" in found:
        found.discard("multiple")
    return {key: word for key, word in WORDS.items() if key in found}


def as_jax(program: Program, topology: Topology, declared: str = AUTO) -> tuple[str, ...]:
    """Return what is worked out as JAX does on a GPU: ``products``, ``lookups``, ``multiple``."""
    if topology.chip.platform != "gpu":
        return ()
    taken = choose(program, topology, declared)
    return tuple(key for key in WORDS if key not in taken)


def _outside_attention(scope: Scope) -> Iterator[Equation]:
    """Walk the equations but for those of attention, whose kernels take their own gradients."""
    for equation in scope.equations:
        yield equation
        for inner in () if attention_call(equation.eqn) is not None else equation.scopes:
            yield from _outside_attention(inner)
