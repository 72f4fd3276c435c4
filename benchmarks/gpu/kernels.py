"""What XLA's own kernels reach on this device: products, elementwise work, odd widths, the optimizer.

`python benchmarks/gpu/kernels.py [--small]` prints a JSON line each, by wall clock. Products and reductions
of a vocabulary of 50,257 stand beside those of 50,304.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

_ROUNDS = 3
# Rows, columns, and what is summed over.
PRODUCTS = (
    (32768, 2048, 2048),
    (32768, 8192, 2048),
    (32768, 2048, 8192),
    (32768, 14336, 4096),
    (8192, 8192, 8192),
    (2048, 8192, 32768),
    (4096, 128256, 2048),
    (4096, 50257, 768),
    (4096, 50304, 768),
    (65536, 3072, 768),
)


def main() -> None:
    """Print the lines; what fails says so and the rest goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    scale = 64 if small else 1
    for rows, columns, inner in PRODUCTS[:2] if small else PRODUCTS:
        _say("product", lambda r=rows, c=columns, k=inner: _product(r // scale, c // scale, k // scale))
    for dtype in (jnp.bfloat16, jnp.float32):
        _say("add", lambda d=dtype: _bandwidth(lambda x, y: 2 * x + y, d, 32768 // scale, 8192, reads=2))
    for vocabulary in (50_257, 50_304):
        _say("cross entropy and its gradient", lambda v=vocabulary: _cross_entropy(4096 // scale, v))
    _say("adamw", lambda: _optimizer(3 * 2048 * 8192 * 16 // scale**2))


def _say(kind: str, measure: Callable[[], dict[str, Any]]) -> None:
    row: dict[str, Any] = {"kind": kind, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    try:
        row |= measure()
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    print(json.dumps(row), flush=True)


def _seconds(function: Callable[..., Any], *operands: Any, times: int = 10) -> float:
    jitted = jax.jit(function)
    for _ in range(2):
        jax.block_until_ready(jitted(*operands))
    rounds = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        for _ in range(times):
            result = jitted(*operands)
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - begun) / times)
    return statistics.median(rounds)


def _normal(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, dtype)


def _product(rows: int, columns: int, inner: int) -> dict[str, Any]:
    spent = _seconds(jnp.matmul, _normal(rows, inner), _normal(inner, columns))
    return {
        "rows": rows,
        "columns": columns,
        "inner": inner,
        "seconds": spent,
        "flops_per_second": 2 * rows * columns * inner / spent,
    }


def _bandwidth(function: Any, dtype: Any, rows: int, columns: int, *, reads: int) -> dict[str, Any]:
    operands = [_normal(rows, columns, dtype=dtype) for _ in range(reads)]
    spent = _seconds(function, *operands)
    moved = (reads + 1) * operands[0].nbytes
    return {"dtype": jnp.dtype(dtype).name, "seconds": spent, "bytes_per_second": moved / spent}


def _cross_entropy(rows: int, vocabulary: int) -> dict[str, Any]:
    logits, labels = _normal(rows, vocabulary, dtype=jnp.float32), jnp.arange(rows)

    def loss(values: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(values, labels).sum()

    spent = _seconds(jax.grad(loss), logits)
    return {
        "rows": rows,
        "vocabulary": vocabulary,
        "seconds": spent,
        "bytes_per_second": 2 * logits.nbytes / spent,
    }


def _optimizer(size: int) -> dict[str, Any]:
    optimizer, params = optax.adamw(1e-4), _normal(size, dtype=jnp.float32)
    moments = optimizer.init(params)

    def update(params: Any, moments: Any, gradient: Any) -> Any:
        change, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, change), moments

    spent = _seconds(update, params, moments, 0.1 * params, times=5)
    # Parameters and two moments are read and written, a gradient is read.
    return {"parameters": size, "seconds": spent, "bytes_per_second": 7 * params.nbytes / spent}


if __name__ == "__main__":
    main()
