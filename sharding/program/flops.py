"""How much an equation computes, and which dims divide that work when they are sharded."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from .primitives import Trait, primitives
from .program import Equation, Factor, Program, Scope

# matmul runs on the matrix unit, vector on the vector unit; move computes nothing.
Unit = Literal["matmul", "vector", "move"]

_PRODUCTS = primitives(Trait.PRODUCT)
_MOVES = primitives(Trait.MOVE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of one run of an equation: the product of its iteration space, unsharded.

    Sharding any of `dims` divides it; a dim that stands twice (queries' and keys' sequence) may be sharded
    in one of its places.
    """

    flops: float
    dims: tuple[int, ...]
    unit: Unit


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulRoles:
    """The factors of a matmul-like equation by role; a convolution's windows are contracted."""

    batch: tuple[Factor, ...]
    lhs: tuple[Factor, ...]
    rhs: tuple[Factor, ...]
    contracting: tuple[Factor, ...]


def matmul_roles(equation: Equation) -> MatmulRoles | None:
    """Return the roles of the factors of a matmul, ragged matmul or convolution; None for anything else."""
    if equation.primitive not in _PRODUCTS:
        return None
    roles: dict[str, list[Factor]] = {"batch": [], "lhs": [], "rhs": [], "contracting": []}
    for factor in _iterated(equation):
        operands = {operand for operand, _ in factor.ins}
        if factor.kind in ("contract", "window"):
            roles["contracting"].append(factor)
        elif factor.kind != "group":
            role = "batch" if {0, 1} <= operands else "rhs" if 1 in operands else "lhs"
            roles[role].append(factor)
    return MatmulRoles(**{role: tuple(factors) for role, factors in roles.items()})


def work(equation: Equation) -> Work:
    """Return the work of one run of `equation`, without that of the scopes it runs.

    A multiplication and an addition are two operations; an elementwise operation counts one per element,
    a sort n log n, a Fourier transform 5 n log n.
    """
    if equation.scopes or equation.primitive in _MOVES or not equation.factors:
        return Work(flops=0.0, dims=(), unit="move")
    counted = _iterated(equation)
    elements = math.prod(factor.size for factor in counted if factor.kind != "group")
    along = math.prod(factor.size for factor in counted if factor.kind == "whole")
    per_element = 1.0
    unit: Unit = "vector"
    if equation.primitive in _PRODUCTS:
        per_element, unit = 2.0, "matmul"
    elif equation.primitive == "sort":
        per_element = max(math.log2(max(along, 1)), 1.0)
    elif equation.primitive == "fft":
        per_element = 5.0 * max(math.log2(max(along, 1)), 1.0)
    dims = tuple(dim for factor in counted if factor.kind not in ("whole", "window") for dim in factor.dims)
    return Work(flops=per_element * elements, dims=dims, unit=unit)


def _iterated(equation: Equation) -> list[Factor]:
    """Return the factors that an equation runs over: its results', and those it reduces or chooses from."""
    ragged = equation.primitive == "ragged_dot_general"
    return [
        factor
        for factor in equation.factors
        if (factor.outs and not (ragged and factor.ins and factor.ins[0][0] == 2))
        or factor.kind in ("contract", "reduce", "window", "group")
    ]


def total_flops(program: Program) -> float:
    """Return the operations of one run of the program; of a condition's arms only the largest counts."""
    return _scope_flops(program.scope)


def _scope_flops(scope: Scope) -> float:
    total = 0.0
    for equation in scope.equations:
        inner = [_scope_flops(scope) for scope in equation.scopes]
        runs = max(inner, default=0.0) if equation.primitive == "cond" else sum(inner)
        total += work(equation).flops + runs * (1 if equation.trips is None else equation.trips)
    return total
