"""Print what is recognised of attention and losses as people write them, and whether values are kept.

How long recognising attention takes is printed too.

python benchmarks/recognition.py
"""

from __future__ import annotations

import time
from typing import Any

import attention_ways
import jax
import jax.numpy as jnp
import segment_ways
import softmax_ways
from attention_ways import OTHER, Way, arrays
from jax.extend import core
from loss_ways import LEFT as LOSSES_LEFT
from loss_ways import WAYS as LOSSES
from loss_ways import arrays as of_losses
from meshwright.sharding.ops.attention import attention_call
from meshwright.sharding.program.forms import losses
from meshwright.sharding.program.jaxpr import Traced
from meshwright.sharding.program.recognise import recognised

WAYS = attention_ways.WAYS | segment_ways.WAYS | softmax_ways.WAYS
LEFT = attention_ways.LEFT | softmax_ways.LEFT
TOLERANCE = {"half precision": 1e-2, "widened to float32": 1e-2, "half_precision": 1e-2}


def traced(fn: Any, *args: Any) -> Traced:
    """Return `fn` as it is traced on `args`."""
    jaxpr, result = jax.make_jaxpr(fn, return_shape=True)(*args)
    return Traced(jaxpr=jaxpr, args=args, result=result)


def calls(jaxpr: core.Jaxpr) -> int:
    """Return how many calls of attention a program has, bodies included."""
    inner = [one for eqn in jaxpr.eqns for one in core.jaxprs_in_params(eqn.params)]
    own = sum(attention_call(eqn) is not None for eqn in jaxpr.eqns)
    return own + sum(calls(one) for one in inner)


def error(way: Way, given: dict[str, jax.Array]) -> tuple[int, float, tuple[str, ...]]:
    """Return how many calls `way` becomes, how far its value and gradients are off, and what is noted."""
    floats = {name: one for name, one in given.items() if one.dtype == jnp.float32}

    def loss(floats: Any, given: Any) -> jax.Array:
        return jnp.sum(jnp.sin(way({**given, **floats})))

    found = recognised(traced(loss, floats, given), ("attention",))

    def again(floats: Any, given: Any) -> jax.Array:
        return core.jaxpr_as_fun(found.jaxpr)(*jax.tree.leaves((floats, given)))[0]

    one, other = (jax.jit(jax.value_and_grad(f))(floats, given) for f in (loss, again))
    worst = max(
        float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-6))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
    return calls(found.jaxpr.jaxpr), worst, found.notes


def error_of_loss(loss: Any) -> tuple[bool, float, tuple[str, ...]]:
    """Return whether `loss` is recognised, how far its value and gradients are off, and what is noted."""
    params, batch = of_losses()
    one = traced(loss, params, batch)
    found = recognised(one, ("losses",))
    run = core.jaxpr_as_fun(found.jaxpr)
    both = (lambda p: loss(p, batch), lambda p: run(*jax.tree.leaves((p, batch)))[0])
    want, got = (jax.tree.leaves(jax.jit(jax.value_and_grad(f))(params)) for f in both)
    worst = max(
        float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1e-6))
        for a, b in zip(want, got, strict=True)
    )
    return found.jaxpr is not one.jaxpr, worst, found.notes


def told_of_losses() -> None:
    """Print a line for each loss, with logits of a few thousand numbers taken for many."""
    losses.WHOLE_BATCH, losses.ROW_CHUNK = 100, 300
    right = 0
    for name, loss in LOSSES.items():
        done, off, notes = error_of_loss(loss)
        left = name in LOSSES_LEFT and not done and LOSSES_LEFT[name] in " ".join(notes)
        good = (done or left) and off <= TOLERANCE.get(name, 1e-5)
        right += good
        how = "in chunks" if done else "left"
        print(f"{'ok ' if good else 'NOT'} {name:28s} {how}, off by {off:.1e} {'; '.join(notes)}")
    print(f"losses in chunks with their values, or left as is said: {right} of {len(LOSSES)}")


def seconds_of_layers(layers: int) -> tuple[float, float, int]:
    """Return the seconds of tracing and of recognising so many layers, and how many calls they become."""
    shape = jax.ShapeDtypeStruct((4, 2048, 8, 64), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((layers, 64, 64), jnp.bfloat16)

    def loss(weights: Any, x: Any) -> Any:
        for n in range(layers):
            out = jax.nn.dot_product_attention(x, x @ weights[n], x, is_causal=True)
            x = x + jax.nn.gelu(out @ weights[n])
        return jnp.mean(x.astype(jnp.float32))

    began = time.perf_counter()
    one = traced(loss, weights, shape)
    between = time.perf_counter()
    found = recognised(one, ("attention",))
    return between - began, time.perf_counter() - between, calls(found.jaxpr.jaxpr)


def seconds_of_mask(length: int) -> float:
    """Return the seconds that a window of packed documents over `length` places takes to be read."""
    given = dict.fromkeys(("query", "key"), jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(given: Any, ids: Any) -> Any:
        place = jnp.arange(length)
        gap = place[:, None] - place[None]
        mask = (gap >= 0) & (gap < 4096) & (ids[:, None, :, None] == ids[:, None, None, :])
        scores = jnp.einsum("bqhd,bkhd->bhqk", given["query"], given["key"])
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, scores, -1e9)), given["key"])

    one = traced(loss, given, ids)
    began = time.perf_counter()
    assert calls(recognised(one, ("attention",)).jaxpr.jaxpr) == 1
    return time.perf_counter() - began


def main() -> None:
    """Print a line for each way, and the figures."""
    given = arrays()
    right = 0
    for name, way in WAYS.items():
        count, off, notes = error(way, given)
        good = count > 0 and off <= TOLERANCE.get(name, 1e-5)
        right += good
        print(f"{'ok ' if good else 'NOT'} {name:28s} {count} call(s), off by {off:.1e} {'; '.join(notes)}")
    left = 0
    for name, (way, why) in LEFT.items():
        count, off, notes = error(way, given)
        good = off <= 1e-5 and (count > 0 or any(why in note for note in notes))
        left += good
        print(f"{'ok ' if good else 'NOT'} {name:28s} {count} call(s), off by {off:.1e} {'; '.join(notes)}")
    for name, way in OTHER.items():
        count, off, _ = error(way, given)
        print(f"{'ok ' if count == 0 and off == 0 else 'NOT'} {name:28s} no attention")
    print(f"recognised with their values: {right} of {len(WAYS)}; left with a note: {left} of {len(LEFT)}")
    told_of_losses()
    tracing, finding, count = seconds_of_layers(126)
    print(f"126 layers: {count} calls, {finding:.2f} s after {tracing:.2f} s of tracing")
    print(f"a window of documents over 131072 places: {seconds_of_mask(131072) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
