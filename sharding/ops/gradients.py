"""Gradients in the type that a GPU works fast in: of products of 16-bit operands, and of look-ups.

As JAX differentiates them, a product of bfloat16 operands with a float32 result has a float32 cotangent, so
that both gradients are products of float32, a third as fast; and a look-up in a table of bfloat16 adds its
rows' gradients up in bfloat16, by compare and swap, and rounds each sum as often as a row is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..errors import UserError, nearest

# What a plan may say of each, and when it says nothing the gradients are as JAX takes them.
WORDS: Mapping[str, str] = {"products": "operands", "lookups": "float32"}
_SHORT = (jnp.bfloat16, jnp.float16)
# Precisions by which a TPU, too, multiplies what it is given in bfloat16.
_DEFAULT = (None, jax.lax.Precision.DEFAULT)


def check_gradients(settings: Mapping[str, Any]) -> None:
    """Raise UserError for a plan's ``kernels["gradients"]`` that is not known.

    >>> check_gradients({"products": "operands"})
    """
    for key, word in settings.items():
        if key not in WORDS:
            raise UserError(f"kernels: gradients: {key!r} is unknown; {nearest(key, WORDS)}")
        if word != WORDS[key]:
            raise UserError(f"kernels: gradients: {key}={word!r} is unknown; known: {WORDS[key]}")


def widens(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a product of operands of 16 bits, at default precision, into a wider type."""
    if eqn.primitive.name != "dot_general":
        return False
    avals: list[Any] = [atom.aval for atom in (*eqn.invars, eqn.outvars[0])]
    left, right, out = (aval.dtype for aval in avals)
    precision = eqn.params["precision"]
    each = precision if isinstance(precision, tuple) else (precision,)
    return left == right and left in _SHORT and out == jnp.float32 and all(one in _DEFAULT for one in each)


def product(eqn: core.JaxprEqn, left: Any, right: Any) -> Any:
    """Return the product that `eqn` is; its gradients are products of its operands' type.

    The cotangent is rounded to that type, as a TPU rounds it at default precision, and sums are float32.
    """
    params = eqn.primitive.get_bind_params(eqn.params)

    @jax.custom_vjp
    def multiplied(left: Any, right: Any) -> Any:
        return eqn.primitive.bind(left, right, **params)

    def backward(operands: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any]:
        short = {**params, "preferred_element_type": operands[0].dtype}
        _, pulled = jax.vjp(lambda a, b: eqn.primitive.bind(a, b, **short), *operands)
        return pulled(cotangent.astype(operands[0].dtype))

    multiplied.defvjp(lambda left, right: (multiplied(left, right), (left, right)), backward)
    return multiplied(left, right)


def looked_up(eqn: core.JaxprEqn, table: Any, ids: Any) -> Any:
    """Return the rows that `eqn` reads of a table of 16 bits; its gradient is summed in float32."""
    params = eqn.primitive.get_bind_params(eqn.params)
    shape, dtype = table.shape, table.dtype

    @jax.custom_vjp
    def rows(table: Any, ids: Any) -> Any:
        return eqn.primitive.bind(table, ids, **params)

    def backward(ids: Any, cotangent: Any) -> tuple[Any, Any]:
        wide = jax.ShapeDtypeStruct(shape, jnp.float32)
        (sums,) = jax.linear_transpose(lambda one: eqn.primitive.bind(one, ids, **params), wide)(
            cotangent.astype(jnp.float32)
        )
        return sums.astype(dtype), np.zeros(ids.shape, jax.dtypes.float0)

    rows.defvjp(lambda table, ids: (rows(table, ids), ids), backward)
    return rows(table, ids)


def is_short(dtype: Any) -> bool:
    """Whether a type has 16 bits."""
    return dtype in _SHORT
