"""Operations that are not looked into: kernels, manual regions, calls to the host.

Their dimensions stay whole; a kernel's can be described by `register_op_rule("pallas_call:<name>", …)`.
"""

from __future__ import annotations

from ..primitives import Trait, primitives
from .rule import Rule, whole_rule

RULES: dict[str, Rule] = dict.fromkeys(primitives(Trait.OPAQUE), whole_rule)
