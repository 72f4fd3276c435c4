"""Which loops of a program are a model's layers, whose saved values one may choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax.extend import core

from . import jaxpr as generations

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})


def layer_scans(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Yield the layer scans of a program and of the jitted calls in it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "jit":
            yield from layer_scans(generations.closed(equation.params["jaxpr"]).jaxpr)
        elif is_layer_scan(equation):
            yield equation


def is_layer_scan(equation: core.JaxprEqn) -> bool:
    """Whether it is a `lax.scan` over stacked arrays that holds a matrix product or a convolution."""
    if equation.primitive.name != "scan" or equation.params["length"] < 2:
        return False
    scan = generations.scan_parts(equation)
    return scan.num_xs > 0 and works(scan.body.jaxpr)


def gathering_again(*_: Any, **__: Any) -> bool:
    """Keep nothing: the policy of checkpoints around one product, which gathers its parameter again."""
    return False


def is_checkpointed(body: core.ClosedJaxpr) -> bool:
    """Whether a layer scan's body is under `jax.checkpoint` already: all of its products are."""
    return not any(
        _multiplies(equation)
        for equation in body.jaxpr.eqns
        if equation.primitive.name != "remat2" or equation.params["policy"] is gathering_again
    )


def works(jaxpr: Any) -> bool:
    """Whether a program holds a matrix product or a convolution."""
    return any(_multiplies(equation) for equation in jaxpr.eqns)


def _multiplies(equation: core.JaxprEqn) -> bool:
    return equation.primitive.name in PRODUCTS or any(
        works(inner) for inner in core.jaxprs_in_params(equation.params)
    )
