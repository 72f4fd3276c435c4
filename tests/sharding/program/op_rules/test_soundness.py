"""What the rules claim, checked by running the programs.

A dim that every equation maps over or reduces can be reordered: permuting all arguments along it permutes
the results along it and changes nothing else. A union that is missing, or a dimension that is called
independent and is not, breaks that. It also makes a dim safe to shard.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from meshwright.sharding.program import Program, trace

pytestmark = pytest.mark.numerics

_MADE = {"iota", "random_bits", "rng_bit_generator", "rng_uniform"}


def reorderable(program: Program) -> list[int]:
    """The dims of arguments that may be reordered."""
    spoilt = {
        d for scope in _scopes(program) for v in scope.jaxpr.constvars for c in scope.dims[v] for d in c
    }
    for equation in program.equations():
        for factor in equation.factors:
            made = equation.primitive in _MADE and not factor.ins
            if equation.primitive == "iota":
                made = (0, equation.eqn.params["dimension"]) in factor.outs
            ordered = equation.primitive in ("argmax", "argmin") and factor.kind == "reduce"
            if factor.kind not in ("map", "contract", "reduce") or made or ordered:
                spoilt.update(factor.dims)
    return [dim.id for dim in program.dims if dim.places and dim.id not in spoilt and dim.size > 1]


def _scopes(program: Program) -> list[Any]:
    return [program.scope, *(scope for e in program.equations() for scope in e.scopes)]


def _permuted(program: Program, array: Any, dims: Any, dim: int, order: np.ndarray) -> np.ndarray:
    flat = [d for composition in dims for d in composition]
    value = np.asarray(array).reshape([program.dims[d].size for d in flat])
    for axis, other in enumerate(flat):
        if other == dim:
            value = np.take(value, order, axis=axis)
    return value.reshape(np.shape(array))


def check(fn: Callable[..., Any], *args: Any) -> list[int]:
    """Reorder `args` along every dim that may be; return the sizes of those dims, sorted."""
    program = trace(fn, *args, parameters=())
    run = jax.jit(fn)
    expected = jax.tree.leaves(run(*args))
    leaves, structure = jax.tree.flatten(args)
    free = reorderable(program)
    for dim in free:
        order = np.random.default_rng(0).permutation(program.dims[dim].size)
        order = np.roll(np.arange(len(order)), 1) if (order == np.arange(len(order))).all() else order
        moved = [
            _permuted(program, leaf, argument.dims, dim, order)
            for leaf, argument in zip(leaves, program.arguments, strict=True)
        ]
        results = jax.tree.leaves(run(*structure.unflatten(moved)))
        for result, value, before in zip(results, expected, program.results, strict=True):
            wanted = _permuted(program, value, before.dims, dim, order)
            np.testing.assert_allclose(
                np.asarray(result, np.float64), wanted.astype(np.float64), rtol=2e-3, atol=2e-4
            )
    return sorted(program.dims[d].size for d in free)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).standard_normal(shape).astype(np.float32)


def _ids(limit: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, limit, shape).astype(np.int32)


_conv = functools.partial(
    lax.conv_general_dilated, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)


@jax.custom_vjp
def _custom(x):
    return jnp.sin(x)


_custom.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def _recurrent(w, x):
    return lax.scan(lambda h, row: ((y := jnp.tanh(row @ w + h)), y), jnp.zeros((x.shape[1], w.shape[1])), x)


def _pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


# name → function, arguments, sizes of the dims that may be reordered.
OPERATIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[int]]] = {
    "matmul": (jnp.matmul, (_normal(5, 4), _normal(4, 3)), [3, 4, 5]),
    "batched": (
        lambda a, b: jnp.einsum("gab,gbc->cga", a, b),
        (_normal(2, 5, 4), _normal(2, 4, 3)),
        [2, 3, 4, 5],
    ),
    "gram": (lambda a: a @ a.T, (_normal(5, 4),), [4, 5]),
    "softmax": (lambda a: jax.nn.softmax(a, axis=0), (_normal(5, 4),), [4, 5]),
    "logsumexp": (lambda a: jax.nn.logsumexp(a, axis=1), (_normal(5, 4),), [4, 5]),
    "where": (lambda a, b: jnp.where(b > 0, a, 0.0), (_normal(5, 4), _normal(4)), [4, 5]),
    "outer": (lambda a, b: a[:, None] + b[None], (_normal(5), _normal(4)), [4, 5]),
    "clip": (lambda a: jnp.clip(a, -0.5, 0.5), (_normal(5, 4),), [4, 5]),
    "any": (lambda a: jnp.any(a > 1, axis=0), (_normal(5, 4),), [4, 5]),
    "argmax": (lambda a: jnp.argmax(a, axis=1), (_normal(5, 4),), [5]),
    "variance": (lambda a: jnp.var(a, axis=1), (_normal(5, 4),), [4, 5]),
    "merge": (lambda a: a.reshape(20, 3) * 2, (_normal(5, 4, 3),), [3, 4, 5]),
    "split": (
        lambda a, b: (a.reshape(5, 2, 2, 3) * b).sum(2),
        (_normal(5, 4, 3), _normal(2, 2, 3)),
        [2, 2, 3, 5],
    ),
    "regroup": (lambda a: a.reshape(2, 30), (_normal(4, 15),), [2, 2, 15]),
    "no seam": (lambda a: a.reshape(4, 3, 5), (_normal(3, 4, 5),), [5]),
    "transpose": (lambda a: a.transpose(2, 0, 1), (_normal(5, 4, 3),), [3, 4, 5]),
    "squeeze": (lambda a: a[:, None].squeeze(1), (_normal(5, 4),), [4, 5]),
    "repeat": (lambda a: jnp.repeat(a, 3, axis=1), (_normal(5, 4),), [4, 5]),
    "tile": (lambda a: jnp.tile(a, (2, 3)), (_normal(5, 4),), [4, 5]),
    "stack": (lambda a, b: jnp.stack([a, b], 1), (_normal(5, 4), _normal(5, 4)), [4, 5]),
    "unstack": (lambda a: sum(jnp.unstack(a, axis=1)), (_normal(5, 4, 3),), [3, 5]),
    "concatenate": (lambda a, b: jnp.concatenate([a, b], 1), (_normal(5, 4), _normal(5, 3)), [5]),
    "cut": (lambda a: jnp.split(a, 2, axis=1), (_normal(5, 4),), [5]),
    "slice": (lambda a: a[:, 1:3], (_normal(5, 4),), [5]),
    "first": (lambda a: a[:, 0], (_normal(5, 4),), [5]),
    "flip": (lambda a: a[:, ::-1], (_normal(5, 4),), [5]),
    "roll": (lambda a: a + jnp.roll(a, 1, axis=1), (_normal(5, 4),), [5]),
    "pad": (lambda a: jnp.pad(a, ((0, 0), (1, 2))), (_normal(5, 4),), [5]),
    "sort": (lambda a: jnp.sort(a, axis=1), (_normal(5, 4),), [5]),
    "argsort": (lambda a: jnp.argsort(a, axis=0), (_normal(5, 4),), [4]),
    "top_k": (lambda a: lax.top_k(a, 2), (_normal(5, 4),), [5]),
    "cumsum": (lambda a: jnp.cumsum(a, axis=1), (_normal(5, 4),), [5]),
    "scanned sum": (lambda a: lax.associative_scan(jnp.add, a, axis=1), (_normal(5, 8, 3),), [3, 5]),
    "embed": (lambda t, i: t[i], (_normal(11, 4), _ids(11, 3, 5)), [3, 4, 5]),
    "along": (lambda a, i: jnp.take_along_axis(a, i, axis=1), (_normal(5, 4), _ids(4, 5, 3)), [3, 5]),
    "segments": (lambda a, i: jax.ops.segment_sum(a, i, 6), (_normal(5, 4), _ids(6, 5)), [4, 5]),
    "segment max": (lambda a, i: jax.ops.segment_max(a, i, 6), (_normal(5, 4), _ids(6, 5)), [4, 5]),
    "update": (lambda a, b: lax.dynamic_update_slice(a, b, (0, 1)), (_normal(5, 4), _normal(5, 2)), [5]),
    "place": (lambda a, n: lax.dynamic_slice_in_dim(a, n, 2, 1), (_normal(5, 4), jnp.int32(1)), [5]),
    "conv": (lambda x, k: _conv(x, k, (1, 1)), (_normal(2, 6, 7, 4), _normal(3, 3, 4, 5)), [2, 4, 5]),
    "grouped conv": (
        lambda x, k: _conv(x, k, (2, 1), feature_group_count=2),
        (_normal(3, 6, 7, 8), _normal(3, 3, 4, 10)),
        [2, 3, 4, 5],
    ),
    "depthwise conv": (
        lambda x, k: _conv(x, k, (1, 1), feature_group_count=4),
        (_normal(3, 6, 7, 4), _normal(3, 3, 1, 8)),
        [2, 3, 4],
    ),
    "conv gradient": (
        jax.grad(lambda k, x: jnp.sum(_conv(x, k, (2, 2)) ** 2)),
        (_normal(3, 3, 4, 5), _normal(2, 6, 8, 4)),
        [2, 4, 5],
    ),
    "grouped conv gradient": (
        jax.grad(lambda k, x: jnp.sum(_conv(x, k, (1, 1), feature_group_count=2) ** 2)),
        (_normal(3, 3, 4, 10), _normal(3, 6, 6, 8)),
        [2, 3, 4, 5],
    ),
    "pool": (_pool, (_normal(3, 6, 8, 5),), [3, 5]),
    "pool gradient": (jax.grad(lambda x: jnp.sum(_pool(x) ** 2)), (_normal(3, 6, 8, 5),), [3, 5]),
    "fft": (lambda a: jnp.abs(jnp.fft.rfft(a, axis=1)), (_normal(5, 4, 3),), [3, 5]),
    "cholesky": (lambda a: jnp.linalg.cholesky(a @ a.mT + jnp.eye(4)), (_normal(3, 4, 5),), [3, 5]),
    "solve": (
        lambda a, b: lax.linalg.triangular_solve(jnp.tril(a) + 3 * jnp.eye(4), b, left_side=True, lower=True),
        (_normal(3, 4, 4), _normal(3, 4, 5)),
        [3, 5],
    ),
    "recurrent": (_recurrent, (_normal(4, 4), _normal(6, 5, 4)), [4, 4, 5]),
    "mapped": (lambda w, x: lax.map(lambda row: row @ w, x), (_normal(4, 3), _normal(6, 5, 4)), [3, 4, 5]),
    "checkpointed": (jax.checkpoint(lambda w, x: jnp.sin(x @ w)), (_normal(4, 3), _normal(5, 4)), [3, 4, 5]),
    "custom gradient": (
        jax.grad(lambda x, w: _custom(x @ w).sum()),
        (_normal(5, 4), _normal(4, 3)),
        [3, 4, 5],
    ),
    "loop": (
        lambda w, x: lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x),
        (_normal(4, 4), _normal(5, 4)),
        [4, 5],
    ),
    "condition": (
        lambda w, x: lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: x.sum(1)[:, None] * w[0]),
        (_normal(4, 3), _normal(5, 4)),
        [3, 5],
    ),
    "vmapped": (jax.vmap(lambda w, x: w @ x, (None, 0)), (_normal(4, 3), _normal(5, 3)), [3, 4, 5]),
    "attention": (
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v),
        (_normal(2, 5, 6, 4), _normal(2, 7, 3, 4), _normal(2, 7, 3, 4)),
        [2, 2, 3, 4, 4, 5, 7],
    ),
}


@pytest.mark.primitives
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_mean_what_their_rules_say(name: str):
    fn, args, sizes = OPERATIONS[name]
    assert check(fn, *args) == sizes


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mixture_of_experts", [8, 32, 64]),
        ("lstm", [8, 16]),
        pytest.param("decoder", [2, 8, 8, 8, 32, 48], marks=pytest.mark.slow),
        pytest.param("resnet", [3, 8, 16, 16, 16, 32, 32, 32], marks=pytest.mark.slow),
    ],
)
def test_models_can_be_reordered(name: str, sizes: list[int]):
    case = zoo.MODELS[name]()
    assert check(case.loss, *case.arrays()) == sizes


def _random_program(choices: list[tuple[int, int, int]]) -> Callable[[jax.Array, list[jax.Array]], Any]:
    """A function of an array and square-ish weights, built from a list of choices."""

    def run(x: jax.Array, weights: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        first = x
        for step, (op, a, b) in enumerate(choices):
            rank = x.ndim
            i, j = a % rank, b % rank
            if op == 0:
                x = jnp.tanh(x) + 0.1 * x
            elif op == 1:
                w = weights[step][: x.shape[-1], :4]
                x = x @ w if w.shape[0] == x.shape[-1] else x
            elif op == 2:
                x = jnp.swapaxes(x, i, j)
            elif op == 3 and rank > 1:
                k = a % (rank - 1)
                x = x.reshape(*x.shape[:k], -1, *x.shape[k + 2 :])
            elif op == 4 and x.shape[i] % 2 == 0 and rank < 5:
                x = x.reshape(*x.shape[:i], 2, x.shape[i] // 2, *x.shape[i + 1 :])
            elif op == 5 and rank > 1:
                x = jnp.max(x, axis=i) if b % 2 else jnp.mean(x, axis=i)
            elif op == 6:
                x = jax.nn.softmax(x, axis=i)
            elif op == 7 and x.size < 2000:
                x = jnp.concatenate([x, 2 * x], axis=i)
            elif op == 8:
                x = jnp.cumsum(x, axis=i)
            elif op == 9 and rank == 2:
                x = x @ x.T
            elif op == 10 and x.shape == first.shape:
                x = x * first
            elif op == 11 and rank > 1:
                x = lax.scan(lambda c, row: (c + row, c * 0.5 + row), jnp.zeros(x.shape[1:]), x)[1]
            elif op == 12 and x.size < 2000:
                x = jnp.repeat(x, 2, axis=i)
            elif op == 13 and x.shape[i] % 2 == 0:
                left, right = jnp.split(x, 2, axis=i)
                x = left * right
            elif op == 14 and rank > 1:
                x = lax.map(jnp.sin, x)
        return x, jnp.mean(x**2)

    return run


@given(
    shape=st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=3),
    choices=st.lists(
        st.tuples(st.integers(0, 14), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7
    ),
)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_random_programs_can_be_reordered(shape: list[int], choices: list[tuple[int, int, int]]):
    weights = [_normal(48, 4 + n) for n in range(len(choices))]
    check(_random_program(choices), _normal(*shape), weights)
