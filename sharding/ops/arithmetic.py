"""Products and look-ups of 16 bits as a GPU works them out fast, their values kept.

As JAX differentiates them, a product of bfloat16 operands with a float32 result has a float32 cotangent, so
that both gradients are products of float32, a third as fast; a look-up in a table of bfloat16 adds its
rows' gradients up in bfloat16, by compare and swap, and rounds each sum as often as a row is read; and a
matrix whose rows do not begin at whole 16 bytes, as those of an odd vocabulary, leaves cuBLAS to slower
kernels (`docs/decisions/arithmetic-on-gpus.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..errors import UserError, nearest

# What a plan may say of each: gradients of products in their operands' type, sums of look-ups, and what the
# widths of matrices are padded to multiples of. What it does not name is as JAX has it.
WORDS: Mapping[str, Any] = {"products": "operands", "lookups": "float32", "multiple": 64}
_SHORT = (jnp.bfloat16, jnp.float16)
# Precisions by which a TPU, too, multiplies what it is given in bfloat16.
_DEFAULT = (None, jax.lax.Precision.DEFAULT)
# Elements of 16 bits that are 16 bytes, and the least width of a matrix that is worth padding.
_WHOLE, _LEAST = 8, 1024


def check_arithmetic(settings: Mapping[str, Any]) -> None:
    """Raise UserError for a plan's ``kernels["arithmetic"]`` that is not known.

    >>> check_arithmetic({"products": "operands"})
    """
    for key, word in settings.items():
        if key not in WORDS:
            raise UserError(f"kernels: arithmetic: {key!r} is unknown; {nearest(key, WORDS)}")
        if word != WORDS[key]:
            raise UserError(f"kernels: arithmetic: {key}={word!r} is unknown; known: {WORDS[key]}")


def widens(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a product of bfloat16, at default precision, into float32.

    Small cotangents of float16, which has few exponents, are none of its numbers any more: it is left alone.
    """
    if eqn.primitive.name != "dot_general":
        return False
    avals: list[Any] = [atom.aval for atom in (*eqn.invars, eqn.outvars[0])]
    left, right, out = (aval.dtype for aval in avals)
    precision = eqn.params["precision"]
    each = precision if isinstance(precision, tuple) else (precision,)
    short = left == right == jnp.bfloat16 and out == jnp.float32
    return short and all(one in _DEFAULT for one in each)


def is_short(dtype: Any) -> bool:
    """Whether a type has 16 bits."""
    return dtype in _SHORT


def odd_width(eqn: core.JaxprEqn) -> tuple[int, int] | None:
    """Return which operand of a product that `widens` is a matrix of an odd width, and its dimension of it.

    Only a vocabulary is as wide: other products into float32 are attention's.
    """
    (contracted, batch) = eqn.params["dimension_numbers"]
    if any(batch):
        return None
    for operand, (atom, used) in enumerate(zip(eqn.invars, contracted, strict=True)):
        aval: Any = atom.aval
        free = [n for n in range(aval.ndim) if n not in used]
        width = aval.shape[free[0]] if len(free) == 1 and aval.ndim == 2 else 0
        if width >= _LEAST and width % _WHOLE:
            return operand, free[0]
    return None


def product(
    eqn: core.JaxprEqn, left: Any, right: Any, settings: Mapping[str, Any], *, shared: bool = False
) -> Any:
    """Return the product that `eqn`, which `widens`, is.

    With ``products`` its gradients are products of its operands' type: the cotangent is rounded to that type,
    as a TPU rounds it at default precision, and sums are float32. With ``multiple`` a matrix of an odd width
    is padded by zeros, whose results are left out. Gradients that several devices have shares of (`shared`)
    are float32 until they are rounded, as JAX has them: XLA adds the shares up as it finds them.
    """
    odd = odd_width(eqn) if "multiple" in settings else None
    if odd is None:
        return _multiplied(eqn, left, right, settings, shared)
    operands, (side, dimension) = [left, right], odd
    width = operands[side].shape[dimension]
    behind = -width % settings["multiple"]
    padding = [(0, behind * (n == dimension)) for n in range(2)]
    operands[side] = jnp.pad(operands[side], padding)
    found = _multiplied(eqn, operands[0], operands[1], settings, shared)
    # Free dimensions of the left operand come first, those of the right one last.
    place = 0 if side == 0 else found.ndim - 1
    return jax.lax.slice_in_dim(found, 0, width, axis=place)


def _multiplied(eqn: core.JaxprEqn, left: Any, right: Any, settings: Mapping[str, Any], shared: bool) -> Any:
    params = eqn.primitive.get_bind_params(eqn.params)
    if "products" not in settings:
        return eqn.primitive.bind(left, right, **params)

    @jax.custom_vjp
    def multiplied(left: Any, right: Any) -> Any:
        return eqn.primitive.bind(left, right, **params)

    def backward(operands: tuple[Any, Any], cotangent: Any) -> tuple[Any, Any]:
        short = {**params, "preferred_element_type": operands[0].dtype}
        _, pulled = jax.vjp(lambda a, b: eqn.primitive.bind(a, b, **short), *operands)
        rounded = cotangent.astype(operands[0].dtype)
        return _in_float32(pulled, rounded) if shared else pulled(rounded)

    multiplied.defvjp(lambda left, right: (multiplied(left, right), (left, right)), backward)
    return multiplied(left, right)


def _in_float32(pulled: Callable[[Any], Any], cotangent: Any) -> Any:
    """Return what `pulled` gives of a cotangent, its products float32 until the end."""
    traced = jax.make_jaxpr(pulled)(cotangent)
    values = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    values |= dict(zip(traced.jaxpr.invars, [cotangent], strict=True))
    for eqn in traced.jaxpr.eqns:
        params = eqn.primitive.get_bind_params(eqn.params)
        if eqn.primitive.name == "dot_general":
            params["preferred_element_type"] = jnp.float32
        values[eqn.outvars[0]] = eqn.primitive.bind(*(values[atom] for atom in eqn.invars), **params)
    return tuple(values[atom].astype(cotangent.dtype) for atom in traced.jaxpr.outvars)


def looked_up(eqn: core.JaxprEqn, table: Any, ids: Any) -> Any:
    """Return the rows that `eqn` reads of a table of 16 bits; its gradient is summed in float32."""
    params = eqn.primitive.get_bind_params(eqn.params)
    shape, dtype = table.shape, table.dtype

    @jax.custom_vjp
    def rows(table: Any, ids: Any) -> Any:
        return eqn.primitive.bind(table, ids, **params)

    def backward(ids: Any, cotangent: Any) -> tuple[Any, Any]:
        # As a card has run it; `row_sums` holds less where a table is tied.
        wide = jax.ShapeDtypeStruct(shape, jnp.float32)
        (sums,) = jax.linear_transpose(lambda one: eqn.primitive.bind(one, ids, **params), wide)(
            cotangent.astype(jnp.float32)
        )
        return sums.astype(dtype), np.zeros(ids.shape, jax.dtypes.float0)

    rows.defvjp(lambda table, ids: (rows(table, ids), ids), backward)
    return rows(table, ids)


def row_sums(eqn: core.JaxprEqn, shape: tuple[int, ...], ids: Any, cotangent: Any) -> Any:
    """Return float32 sums of what each row of a table of `shape` was read by; `eqn` looks rows up."""
    numbers = eqn.params["dimension_numbers"]
    zeros, cotangent = zeros_for(shape, cotangent.astype(jnp.float32))
    return jax.lax.scatter_add(
        zeros,
        ids,
        cotangent,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=numbers.offset_dims,
            inserted_window_dims=numbers.collapsed_slice_dims,
            scatter_dims_to_operand_dims=numbers.start_index_map,
        ),
        indices_are_sorted=eqn.params["indices_are_sorted"],
        unique_indices=eqn.params["unique_indices"],
        mode=eqn.params["mode"],
    )


def zeros_for(shape: tuple[int, ...], value: Any) -> tuple[Any, Any]:
    """Return zeros of `value`'s type, which are there when it is, and `value`.

    XLA writes all zeros of one shape in one kernel: those that a look-up's gradient begins with would be held
    from where the loss begins to sum its own gradient of a tied table.
    """
    zero, value = jax.lax.optimization_barrier((jnp.zeros((), value.dtype), value))
    return jnp.broadcast_to(zero, shape), value
