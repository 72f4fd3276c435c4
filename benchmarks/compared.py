"""Losses held against what JAX gives of them: their value, aux and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

WRONG = 1e-8


def told(outcome: str, line: str, only: Sequence[str] = ()) -> tuple[str, str]:
    """Print what became of a loss, where it is one `only` of some outcomes or there are none; return it."""
    if not only or outcome in only:
        print(f"{outcome:8} {line}"[:2000], flush=True)
    return outcome, line


def both(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the jitted value, aux and gradients of a loss."""

    def function(*args: Any) -> Any:
        found = loss(*args)
        return found if isinstance(found, tuple) else (found, None)

    def run(*args: Any) -> Any:
        (value, aux), gradients = jax.value_and_grad(function, has_aux=True)(*args)
        return (value if aux is None else (value, aux)), gradients

    # Numbers are what is looked at, not seconds: a third of the compiler's time is saved.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def difference(got: Any, want: Any) -> float:
    """Return the largest difference of any array, in parts of its own largest number."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype or not np.array_equal(np.isnan(a), np.isnan(b)):
            return float("inf")
        if not np.issubdtype(a.dtype, np.inexact):
            worst = max(worst, float(not np.array_equal(a, b)))
        elif a.size:
            apart = float(np.nanmax(np.abs(a - b)) / max(float(np.nanmax(np.abs(b))), 1e-3))
            # What is cast to narrower floats is that of their digits.
            worst = max(worst, apart if a.dtype.itemsize > 4 else apart / 1000)
    return worst
