"""What primitives do to each element by itself, in numpy: values that can be told without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# What gives the same numbers on, in another type or under another name.
SAME = frozenset({"convert_element_type", "copy", "copy_p", "name", "stop_gradient", "optimization_barrier"})


class Untold(Exception):
    """A value depends on data, or on a dimension that it should not depend on."""


def _quotient(a: Any, b: Any) -> Any:
    if not _whole(a, b):
        return a / b
    # XLA's division of integers rounds towards zero, numpy's down.
    below = np.floor_divide(a, b)
    return below + ((below * b != a) & (np.less(a, 0) != np.less(b, 0)))


def _remainder(a: Any, b: Any) -> Any:
    _whole(a, b)
    return np.fmod(a, b)


def _whole(a: Any, b: Any) -> bool:
    """Whether numbers are whole; by zero of those each device divides as it likes."""
    whole = np.issubdtype(np.asarray(a).dtype, np.integer)
    if whole and not np.all(b):
        raise Untold
    return whole


def _select(which: Any, *cases: Any) -> Any:
    if len(cases) != 2:
        return np.choose(which, cases, mode="clip")
    return np.where(which, cases[1], cases[0])


# What primitives do to each element by itself, in numpy.
POINTWISE: Mapping[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "div": _quotient,
    "eq": np.equal,
    "exp": np.exp,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "log": np.log,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "pow": np.power,
    "rem": _remainder,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": _select,
    "sign": np.sign,
    "sqrt": np.sqrt,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}
