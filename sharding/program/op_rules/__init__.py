"""One rule per primitive, and the door for a user's own."""

from __future__ import annotations

import functools
from typing import Any

from . import contraction, elementwise, indexing, linalg, opaque, random, reduction, shape, window
from .rule import Op, OpRule, Rule, whole_rule

_users: dict[str, Rule] = {}


def register_op_rule(primitive_name: str, rule: Rule) -> None:
    """Say what a primitive does to the dimensions of its arrays; replaces the rule it had.

    `primitive_name` is the primitive's own (``"my_op"``), or ``"jit:name"`` for a jitted function and
    ``"pallas_call:name"`` for a kernel: such a call is then one operation that is not looked into.
    `rule` takes an `Op` (shapes and parameters) and returns an `OpRule`, most easily by `einsum_rule`.

    >>> from meshwright.sharding.program import einsum_rule, register_op_rule
    >>> register_op_rule("pallas_call:scale", lambda op: einsum_rule(op, "sd, d -> sd", whole="d"))
    """
    _users[primitive_name] = rule


@functools.cache
def builtin_rules() -> dict[str, Rule]:
    """Return the rules of the primitives of JAX, by name."""
    families = (contraction, elementwise, indexing, linalg, opaque, random, reduction, shape, window)
    return {name: rule for family in families for name, rule in family.RULES.items()}


def users_rule(primitive_name: str, params: Any) -> Rule | None:
    """Return the rule that a user registered for this equation, if any."""
    if not _users:
        return None
    name = params.get("name")
    if isinstance(name, str) and f"{primitive_name}:{name}" in _users:
        return _users[f"{primitive_name}:{name}"]
    return _users.get(primitive_name)


__all__ = ["Op", "OpRule", "Rule", "builtin_rules", "register_op_rule", "users_rule", "whole_rule"]
