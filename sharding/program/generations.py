"""What differs between the JAX generations we support (0.10 and 0.12), and the private names we need.

No other file of `meshwright.sharding` may know either.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from jax._src import source_info_util  # seen in 0.10.2 and 0.12.0
from jax.extend import core


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanParts:
    """A `scan` equation's body and how its inputs divide: constants, then carry, then stacked arrays."""

    body: core.ClosedJaxpr
    num_consts: int
    num_carry: int
    num_xs: int


def scan_parts(equation: core.JaxprEqn) -> ScanParts:
    """Read a `scan` equation: 0.10 counts its inputs, 0.12 keeps them as flat trees."""
    params = equation.params
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:
        consts, carry = (len(part) for part in params["ft_in"].unpack()[:2])
    return ScanParts(
        body=closed(params["jaxpr"]),
        num_consts=consts,
        num_carry=carry,
        num_xs=len(equation.invars) - consts - carry,
    )


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """Return `jaxpr` with its constants: 0.12 keeps jaxprs in equations open when they have none."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


@contextlib.contextmanager
def context_of(equation: core.JaxprEqn) -> Iterator[None]:
    """Within it, new equations carry the source line, name scope and settings of `equation`."""
    info = equation.source_info
    scope = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=scope), equation.ctx.manager:
        yield
