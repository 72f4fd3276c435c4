"""Accumulation against the whole batch: losses of many kinds by both doors, and random programs.

    python benchmarks/accumulation.py [name ...]
    python benchmarks/accumulation.py --random 300 --seed 5000

Each loss is planned and declared with microbatches, and its value, aux and gradients are compared with those
of the whole batch in float64, or it is refused with its line. Random programs of about ten operations each go
in parts by block (even seeds) and by stride. Prints a line for whatever is wrong, and counts.
"""

from __future__ import annotations

import argparse
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import accumulation_losses as kinds
import accumulation_models
import jax
import jax.numpy as jnp
import numpy as np
from meshwright.sharding import UserError, declare, plan
from meshwright.sharding.program.jaxpr import Traces
from meshwright.sharding.transform.accumulation.proof import MAX_PASSES, in_parts
from meshwright.sharding.transform.accumulation.run import Run
from meshwright.sharding.transform.accumulation.values import NotInParts

WRONG = 1e-8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="losses; all if not given")
    parser.add_argument("--random", type=int, default=0, help="random programs to try instead")
    parser.add_argument("--seed", type=int, default=5000, help="of the first of them")
    parser.add_argument("--parts", type=int, default=4)
    given = parser.parse_args()
    with jax.enable_x64(True):
        found = tried(given.seed, given.random) if given.random else compared(given.names, given.parts)
        counts = Counter(outcome for outcome, _ in found)
    print(dict(counts))


def compared(names: list[str], parts: int) -> Iterator[tuple[str, str]]:
    """Yield what became of each loss by each door, ``exact``, ``refused`` or ``WRONG``."""
    params, batch = kinds.params(), kinds.batch()
    shapes = jax.eval_shape(lambda: params), jax.eval_shape(lambda: batch)
    losses = kinds.losses(kinds) | kinds.losses(accumulation_models)
    for name, loss in losses.items():
        if names and name not in names:
            continue
        want = both(loss)(params, batch)
        for door in ("declare", "plan"):
            more = {"mesh": {"data": 8}} if door == "declare" else {}
            try:
                made = {"declare": declare, "plan": plan}[door](
                    loss, *shapes, topology="cpu:8", microbatches=parts, recognise=(), **more
                )
            except UserError as error:
                known = "at " in str(error) and ".py:" in str(error)
                yield told("refused" if known else "REFUSED WITHOUT A LINE", f"{door} {name}: {error}")
                continue
            apart = difference(both(made.apply(loss))(params, batch), want)
            outcome = "exact" if apart < WRONG else "WRONG"
            passes = next((note for note in made.notes if "passes" in note), "")
            yield told(outcome, f"{door} {name}: {apart:.1e} {passes}")


def tried(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Yield what became of each random program in two parts."""
    params, batch = random_arrays()
    for number in range(seed, seed + count):
        loss = random_program(number)
        try:
            read = in_parts(Traces(loss).on(params, batch), 2, by_block=number % 2 == 0)
            if why := read.too_many(MAX_PASSES):
                raise why
        except NotInParts:
            yield "refused", ""
            continue
        run = Run(read, lambda function, _: function, loss)
        want = both(loss)(params, batch)
        got = jax.jit(lambda *args, run=run: run.value_and_grad((0, 1, 2), *args))(params, batch)
        apart = difference(got, want)
        yield told("exact" if apart < WRONG else "WRONG", f"seed {number}: {apart:.1e}", only="WRONG")


def told(outcome: str, line: str, only: str | None = None) -> tuple[str, str]:
    if only in (None, outcome):
        print(f"{outcome:8} {line}"[:240], flush=True)
    return outcome, line


def both(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the jitted value, aux and gradients of a loss."""

    def function(params: Any, batch: Any) -> Any:
        found = loss(params, batch)
        return found if isinstance(found, tuple) else (found, None)

    def run(params: Any, batch: Any) -> Any:
        (value, aux), gradients = jax.value_and_grad(function, has_aux=True)(params, batch)
        return (value if aux is None else (value, aux)), gradients

    return jax.jit(run)


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
            worst = max(worst, float(np.nanmax(np.abs(a - b)) / max(float(np.nanmax(np.abs(b))), 1e-3)))
    return worst


# Random programs. Rows and columns are as many on purpose: nothing may be told apart by its size.

ROWS, TIME, WIDTH = 4, 3, 4
_ONE = (
    jnp.tanh,
    jnp.sin,
    jax.nn.silu,
    jnp.square,
    jnp.abs,
    jax.nn.relu,
    jax.lax.stop_gradient,
    lambda x: jnp.log1p(x * x),
    lambda x: jnp.clip(x, -0.7, 0.4),
    lambda x: jnp.where(x > 0.2, x, 0.1 * x),
)
_TWO = (
    jnp.add,
    jnp.multiply,
    jnp.subtract,
    jnp.minimum,
    lambda a, b: a / (1 + b * b),
    lambda a, b: jnp.where(a < b, a, b),
)
_STEPS = [
    "one",
    "two",
    "two",
    "two",
    "fold",
    "fold",
    "mean",
    "product",
    "product",
    "turn",
    "regroup",
    "count",
    "draw",
    "along",
    "order",
    "look",
    "spread",
    "soft",
    "join",
    "turned",
    "walk",
    "branch",
    "cut",
    "pairs",
    "centred",
]


def random_arrays() -> tuple[dict[str, Any], dict[str, Any]]:
    keys = iter(jax.random.split(jax.random.key(11), 6))

    def normal(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape)

    params = {"bias": normal(WIDTH), "table": normal(TIME, WIDTH), "weights": normal(WIDTH, WIDTH)}
    batch = {
        "rows": normal(ROWS, WIDTH),
        "series": normal(ROWS, TIME, WIDTH),
        "shares": jnp.abs(normal(ROWS)),
    }
    return params, batch


def random_program(seed: int) -> Callable[[Any, Any], Any]:
    """Return a loss whose operations `seed` draws; parameters reach nearly all of them."""

    def loss(params: Any, batch: Any) -> Any:
        draw = random.Random(seed)
        pool = [*params.values(), *batch.values()]
        pool.append(jnp.tanh(batch["rows"] @ params["weights"] + params["bias"]))
        pool.append(jnp.sin(batch["series"] @ params["weights"]))
        pool.append(batch["shares"] * (batch["rows"] @ params["bias"]))
        for step in range(draw.randint(6, 12)):
            x = draw.choice(pool[-6:] if draw.random() < 0.6 else pool)
            y = _step(draw, draw.choice(_STEPS), x, pool, params, step)
            if y is not None and y.size <= 400:
                pool.append(y)
        result = sum(jnp.mean(one) if draw.random() < 0.7 else jnp.sum(one) for one in pool[-3:])
        aux = [one for one in pool[-2:] if draw.random() < 0.3]
        return result + jnp.mean(params["weights"] ** 2), aux

    return loss


def _step(draw: random.Random, kind: str, x: Any, pool: list[Any], params: Any, step: int) -> Any:
    axis = draw.randrange(x.ndim) if x.ndim else 0
    if kind == "one":
        return draw.choice(_ONE)(x)
    if kind == "two":
        fits = [one for one in pool if one.ndim == 0 or x.shape[-one.ndim :] == one.shape]
        return draw.choice(_TWO)(x, draw.choice(fits)) if fits else None
    if kind == "mean":
        return draw.choice([jnp.mean, jnp.sum, lambda x: jnp.sqrt(jnp.sum(x * x) + 1)])(x)
    if kind == "branch":
        return jax.lax.cond(jnp.sum(x) > 0, lambda x: jnp.sin(x), lambda x: 2 * x, x)
    if kind == "centred":
        return x - jnp.mean(x) if draw.random() < 0.5 else jnp.where(jnp.mean(x) > 0.1, x, -x)
    return _shaped(draw, kind, x, axis, pool, params, step) if x.ndim else None


def _shaped(
    draw: random.Random, kind: str, x: Any, axis: int, pool: list[Any], params: Any, step: int
) -> Any:
    if kind == "fold":
        return draw.choice([jnp.sum, jnp.mean, jnp.max])(x, axis=axis, keepdims=draw.random() < 0.3)
    if kind == "product":
        fits = [one for one in pool if one.ndim == 2 and one.shape[0] == x.shape[-1]]
        return 0.5 * x @ draw.choice(fits) if fits and x.ndim > 1 else None
    if kind == "turn":
        return x.transpose(draw.sample(range(x.ndim), x.ndim))
    if kind == "regroup":
        return x.reshape(-1, x.shape[-1]) if draw.random() < 0.5 else x.reshape(x.shape[0], -1)
    if kind == "count":
        return x * (1 + jax.lax.broadcasted_iota(x.dtype, x.shape, axis)) / 4
    if kind == "draw":
        return x + 0.3 * jax.random.normal(jax.random.key(step), x.shape)
    if kind == "along":
        return draw.choice([jnp.cumsum, jax.lax.cummax])(x, axis)
    if kind == "order":
        return jnp.sort(x, axis)
    if kind == "look" and x.ndim > 1:
        at = draw.randrange(x.shape[1])
        own = draw.random() < 0.5
        return x[jnp.arange(x.shape[0]), at] if own else jnp.take(x, jnp.array([1, 0, 1]), axis=axis)
    if kind == "spread" and x.size < 100:
        shape = (*x.shape[:axis], draw.choice([ROWS, TIME]), *x.shape[axis:])
        return jnp.broadcast_to(jnp.expand_dims(x, axis), shape)
    if kind == "soft":
        return jax.nn.softmax(x, axis=axis)
    if kind == "join" and x.size < 100:
        return jnp.concatenate([x, 0.5 * x], axis)
    if kind == "turned":
        return jnp.flip(x, axis)
    if kind == "walk" and x.ndim > 1:
        return _walked(draw, x, params)
    if kind == "cut":
        return jax.lax.slice_in_dim(x, 0, max(1, x.shape[axis] - 1), axis=axis)
    if kind == "pairs" and x.ndim == 2:
        return jnp.einsum("ij,kj->ik", x, x) if draw.random() < 0.4 else jnp.einsum("ij,ij->j", x, x)
    return None


def _walked(draw: random.Random, x: Any, params: Any) -> Any:
    """Return what a scan gives: over `x`, or over the weights, with a sum of all of `x` inside or without."""
    if draw.random() < 0.4:
        zero = jnp.zeros(x.shape[1:], x.dtype)
        return jax.lax.scan(lambda c, row: (jnp.tanh(c + row), c * row), zero, x)[draw.randrange(2)]
    if draw.random() < 0.5:
        return jax.lax.scan(lambda c, w: (jnp.sin(c * w.sum()), None), x, params["weights"])[0]
    turn = jax.checkpoint(lambda c, w: (jnp.tanh(c + w.mean()), jnp.mean(c) * jnp.mean(c * c)))
    return jax.lax.scan(turn, x, params["weights"])[1]


if __name__ == "__main__":
    main()
