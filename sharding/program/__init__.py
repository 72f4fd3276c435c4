"""A function as the planner sees it: its equations, and the dimensions that must be sharded alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import door

if TYPE_CHECKING:
    from .flops import Work as Work
    from .flops import total_flops as total_flops
    from .flops import work as work
    from .op_rules import register_op_rule as register_op_rule
    from .op_rules.rule import Op as Op
    from .op_rules.rule import OpRule as OpRule
    from .op_rules.rule import einsum_rule as einsum_rule
    from .program import Conflict as Conflict
    from .program import Dim as Dim
    from .program import Equation as Equation
    from .program import Factor as Factor
    from .program import Program as Program
    from .program import Scope as Scope
    from .tracing import trace as trace

# Name → module that defines it. No module has the name of what it defines, so that importing one cannot
# shadow the other.
_HOMES = {
    "Conflict": "program",
    "Dim": "program",
    "Equation": "program",
    "Factor": "program",
    "Op": "op_rules.rule",
    "OpRule": "op_rules.rule",
    "Program": "program",
    "Scope": "program",
    "Work": "flops",
    "einsum_rule": "op_rules.rule",
    "register_op_rule": "op_rules",
    "total_flops": "flops",
    "trace": "tracing",
    "work": "flops",
}

__all__ = list(_HOMES)
__getattr__, __dir__ = door(__name__, _HOMES)
