"""A traced program run by NumPy, an equation at a time, without a compiler: thousands take minutes.

Loops, branches and calls are walked; what NumPy has no word for (look-ups, random bits) is given to JAX by
itself, which keeps what it compiled for the next of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from meshwright.sharding.program.jaxpr import branches, call_body, run, scan_parts, while_parts
from scipy import special

Array = Any


def interpreted(closed: core.ClosedJaxpr, arguments: Sequence[Array]) -> list[Array]:
    """Return what a traced program gives of its flat `arguments`."""
    jaxpr = closed.jaxpr
    values: dict[Any, Array] = dict(zip(jaxpr.constvars, map(_plain, closed.consts), strict=True))
    values.update(zip(jaxpr.invars, map(_plain, arguments), strict=True))

    def read(atom: Any) -> Array:
        if isinstance(atom, core.Literal):
            aval: Any = atom.aval
            return np.asarray(atom.val, aval.dtype)
        return values[atom]

    for eqn in jaxpr.eqns:
        found = _equation(eqn, [read(atom) for atom in eqn.invars])
        for var, array in zip(eqn.outvars, found, strict=True):
            values[var] = _checked(eqn.primitive.name, var.aval, array)
    return [read(atom) for atom in jaxpr.outvars]


def _plain(array: Any) -> Array:
    """Return a NumPy array, but for what only JAX has, such as keys."""
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        return array
    return np.asarray(array)


def _checked(name: str, aval: Any, array: Array) -> Array:
    array = _plain(array)
    if array.shape != tuple(aval.shape):
        raise AssertionError(f"{name} gives {array.shape} where the trace has {aval.shape}")
    return array if array.dtype == aval.dtype else array.astype(aval.dtype)


def _equation(eqn: core.JaxprEqn, ins: list[Array]) -> Sequence[Array]:
    name = eqn.primitive.name
    if name in _CONTROL:
        return _CONTROL[name](eqn, ins)
    # What is reduced by a function has its program, which is no call.
    body = None if name == "reduce" else call_body(eqn)
    if body is not None:
        return interpreted(body, ins)
    if name in _PLAIN and all(isinstance(one, np.ndarray) for one in ins):
        return [_PLAIN[name](*ins)]
    if name in _SHAPED and all(isinstance(one, np.ndarray) for one in ins):
        found = _SHAPED[name](eqn.params, *ins)
        return found if eqn.primitive.multiple_results else [found]
    return run(eqn, ins)


def _scan(eqn: core.JaxprEqn, ins: list[Array]) -> list[Array]:
    parts, p = scan_parts(eqn), eqn.params
    first = parts.num_consts + parts.num_carry
    consts, carry, xs = ins[: parts.num_consts], ins[parts.num_consts : first], ins[first:]
    order = range(p["length"])
    rows: list[list[Array]] = []
    for turn in reversed(order) if p["reverse"] else order:
        found = interpreted(parts.body, [*consts, *carry, *(one[turn] for one in xs)])
        carry = found[: parts.num_carry]
        rows.append(found[parts.num_carry :])
    if p["reverse"]:
        rows.reverse()
    return [*carry, *(np.stack(column) for column in zip(*rows, strict=True))]


def _while(eqn: core.JaxprEqn, ins: list[Array]) -> list[Array]:
    parts = while_parts(eqn)
    tests, bodies = parts.num_cond_consts, parts.num_cond_consts + parts.num_body_consts
    carry = ins[bodies:]
    while np.any(on := interpreted(parts.cond, [*ins[:tests], *carry])[0]):
        found = interpreted(parts.body, [*ins[tests:bodies], *carry])
        # Of several loops side by side those that are done stay as they are.
        going = [on.reshape(on.shape + (1,) * (one.ndim - on.ndim)) for one in found]
        carry = [np.where(test, new, old) for test, new, old in zip(going, found, carry, strict=True)]
    return carry


def _cond(eqn: core.JaxprEqn, ins: list[Array]) -> list[Array]:
    arms = branches(eqn)
    return interpreted(arms[min(max(int(ins[0]), 0), len(arms) - 1)], ins[1:])


_CONTROL: dict[str, Callable[[core.JaxprEqn, list[Array]], Sequence[Array]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}

_PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "sign": np.sign,
    "abs": np.abs,
    "square": np.square,
    "one_minus_square": lambda x: 1 - x * x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "logistic": special.expit,
    "erf": special.erf,
    "erf_inv": special.erfinv,
    "pow": np.power,
    "rem": np.fmod,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "is_finite": np.isfinite,
    "stop_gradient": np.asarray,
    "copy": np.asarray,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}


def _divided(_: Any, a: Array, b: Array) -> Array:
    return a / b if np.issubdtype(a.dtype, np.inexact) else np.trunc(a / b)


def _chosen(_: Any, which: Array, *cases: Array) -> Array:
    if which.dtype == np.bool_:
        return np.where(which, cases[1], cases[0])
    return np.choose(np.broadcast_to(which, cases[0].shape), cases)


def _broadcast(p: Any, x: Array) -> Array:
    shape = [1] * len(p["shape"])
    for dimension, size in zip(p["broadcast_dimensions"], x.shape, strict=True):
        shape[dimension] = size
    return np.broadcast_to(x.reshape(shape), p["shape"])


def _product(p: Any, a: Array, b: Array) -> Array:
    (of_a, of_b), (batch_a, batch_b) = p["dimension_numbers"]
    here, there = [-1] * a.ndim, [-1] * b.ndim
    pairs = [*zip(batch_a, batch_b, strict=True), *zip(of_a, of_b, strict=True)]
    for letter, (one, other) in enumerate(pairs):
        here[one] = there[other] = letter
    free = iter(range(len(pairs), len(pairs) + a.ndim + b.ndim))
    for names in (here, there):
        names[:] = [next(free) if name < 0 else name for name in names]
    common = [here[d] for d in batch_a]
    mine = [name for d, name in enumerate(here) if d not in (*of_a, *batch_a)]
    theirs = [name for d, name in enumerate(there) if d not in (*of_b, *batch_b)]
    return np.einsum(a, here, b, there, [*common, *mine, *theirs])


def _padded(p: Any, x: Array, fill: Array) -> Array:
    config = p["padding_config"]
    inner = [size + max(size - 1, 0) * gap for size, (_, _, gap) in zip(x.shape, config, strict=True)]
    wide = np.full(inner, fill, x.dtype)
    wide[tuple(slice(None, None, gap + 1) for _, _, gap in config)] = x
    cut = wide[
        tuple(
            slice(max(-low, 0), size - max(-high, 0))
            for size, (low, high, _) in zip(inner, config, strict=True)
        )
    ]
    around = [(max(low, 0), max(high, 0)) for low, high, _ in config]
    return np.pad(cut, around, constant_values=fill)


def _sliced(p: Any, x: Array) -> Array:
    steps = p["strides"] or [1] * x.ndim
    return x[tuple(map(slice, p["start_indices"], p["limit_indices"], steps))]


def _window(x: Array, starts: Sequence[Array], sizes: Sequence[int]) -> tuple[slice, ...]:
    first = [min(max(int(one), 0), n - size) for one, n, size in zip(starts, x.shape, sizes, strict=True)]
    return tuple(slice(one, one + size) for one, size in zip(first, sizes, strict=True))


def _updated(_: Any, x: Array, new: Array, *starts: Array) -> Array:
    out = x.copy()
    out[_window(x, starts, new.shape)] = new
    return out


def _sorted(p: Any, *arrays: Array) -> list[Array]:
    # The last key of lexsort counts most; it sorts stably.
    order = np.lexsort(arrays[: p["num_keys"]][::-1], axis=p["dimension"])
    return [np.take_along_axis(one, order, p["dimension"]) for one in arrays]


def _taken_apart(p: Any, x: Array) -> list[Array]:
    return np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"])


def _running(function: Any) -> Callable[..., Array]:
    def along(p: Any, x: Array) -> Array:
        turned = np.flip(x, p["axis"]) if p["reverse"] else x
        found = function.accumulate(turned, axis=p["axis"])
        return np.flip(found, p["axis"]) if p["reverse"] else found

    return along


def _reduced(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda p, x: function(x, axis=tuple(p["axes"]))


def _bits(p: Any, x: Array) -> Array:
    dtype = np.dtype(p["new_dtype"])
    if x.dtype.itemsize == dtype.itemsize:
        return x.view(dtype)
    # Narrower ones stand on a new last dimension, wider ones are made of the last dimension's.
    if x.dtype.itemsize > dtype.itemsize:
        return np.ascontiguousarray(x)[..., None].view(dtype)
    return np.ascontiguousarray(x).view(dtype)[..., 0]


_SHAPED: dict[str, Callable[..., Any]] = {
    "div": _divided,
    "integer_pow": lambda p, x: x ** p["y"],
    "convert_element_type": lambda p, x: x.astype(p["new_dtype"]),
    "select_n": _chosen,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "squeeze": lambda p, x: x.squeeze(tuple(p["dimensions"])),
    "expand_dims": lambda p, x: np.expand_dims(x, tuple(p["dimensions"])),
    "transpose": lambda p, x: x.transpose(p["permutation"]),
    "rev": lambda p, x: np.flip(x, tuple(p["dimensions"])),
    "iota": lambda p: _broadcast(
        {"shape": p["shape"], "broadcast_dimensions": [p["dimension"]]},
        np.arange(p["shape"][p["dimension"]], dtype=p["dtype"]),
    ),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "pad": _padded,
    "slice": _sliced,
    "dynamic_slice": lambda p, x, *starts: x[_window(x, starts, p["slice_sizes"])],
    "dynamic_update_slice": _updated,
    "split": _taken_apart,
    "sort": _sorted,
    "dot_general": _product,
    "reduce_sum": _reduced(np.sum),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_prod": _reduced(np.prod),
    "reduce_or": _reduced(np.bitwise_or.reduce),
    "reduce_and": _reduced(np.bitwise_and.reduce),
    "argmax": lambda p, x: np.argmax(x, p["axes"][0]),
    "argmin": lambda p, x: np.argmin(x, p["axes"][0]),
    "cumsum": _running(np.add),
    "cumprod": _running(np.multiply),
    "cummax": _running(np.maximum),
    "cummin": _running(np.minimum),
    "bitcast_convert_type": _bits,
    "shift_right_logical": lambda _, x, by: (
        x.view(f"u{x.dtype.itemsize}") >> by.astype(f"u{x.dtype.itemsize}")
    ).view(x.dtype),
    "shift_left": lambda _, x, by: x << by,
}
