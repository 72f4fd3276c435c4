"""Losses of models with loops, branches and rules of their own; see `accumulation`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from accumulation_losses import HIDDEN, ROWS, TIME, WIDTH, hidden, row
from jax import lax


def packed(p, b):
    scores = jax.nn.log_softmax(jax.nn.relu(b["series"].reshape(-1, WIDTH) @ p["inside"]) @ p["head"])
    picked, weight = (
        jnp.take_along_axis(scores, b["classes"].reshape(-1, 1), -1)[:, 0],
        b["counts"].reshape(-1),
    )
    return -(picked * weight).sum() / weight.sum(), {"weight": weight.sum()}


def dropped(p, b):
    h = hidden(p, b)
    kept = jnp.where(jax.random.bernoulli(jax.random.key(3), 0.6, h.shape), h / 0.6, 0)
    return optax.softmax_cross_entropy_with_integer_labels(kept @ p["head"], b["class"]).mean()


def scanned(p, b):
    h, _ = lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), hidden(p, b), p["layers"])
    return (h**2).mean()


def scanned_and_checkpointed(p, b):
    h, _ = lax.scan(jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None)), hidden(p, b), p["layers"])
    return jnp.exp((h**2).mean())


def _balanced(h, w):
    gate = jax.nn.softmax(h @ w)
    share = jax.nn.one_hot(gate.argmax(-1), HIDDEN).mean(0)
    return h + jnp.tanh(h @ w), HIDDEN * jnp.sum(share * gate.mean(0))


def balanced_experts(p, b):
    h, balance = lax.scan(_balanced, hidden(p, b), p["layers"])
    return (h**2).mean() + 0.1 * balance.sum()


def balanced_experts_carried_and_checkpointed(p, b):
    @jax.checkpoint
    def layer(carry, w):
        h, added = _balanced(carry[0], w)
        return (h, carry[1] + added), None

    (h, balance), _ = lax.scan(layer, (hidden(p, b), 0.0), p["layers"])
    return (h**2).mean() + 0.1 * balance


def balanced_experts_in_groups(p, b):
    def group(h, layers):
        h, balance = lax.scan(jax.checkpoint(_balanced), h, layers)
        return h, balance.sum()

    h, balance = lax.scan(group, hidden(p, b), jnp.stack([p["layers"], p["layers"]]))
    return (h**2).mean() + 0.1 * balance.mean()


def recurrent(p, b):
    def step(h, x):
        h = jnp.tanh(x @ p["inside"] + h @ p["state"])
        return h, h

    _, found = lax.scan(step, jnp.zeros((ROWS, HIDDEN), p["inside"].dtype), b["series"].swapaxes(0, 1))
    return jnp.mean((found @ p["head"]) ** 2)


def recurrent_with_a_sum(p, b):
    def step(carry, x):
        h = jnp.tanh(x @ p["inside"] + carry[0] @ p["state"])
        return (h, carry[1] + jnp.sum(h**2)), None

    zero = jnp.zeros((ROWS, HIDDEN), p["inside"].dtype)
    (_, total), _ = lax.scan(step, (zero, 0.0), b["series"].swapaxes(0, 1))
    return jnp.log1p(total)


def attention(p, b):
    x = b["series"] + p["places"]
    q, v = (x @ p["square"]).reshape(ROWS, TIME, 2, -1), x.reshape(ROWS, TIME, 2, -1)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, v)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((TIME, TIME), bool)), scores, -1e9))
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(ROWS, TIME, WIDTH)
    return ((out @ p["inside"]) ** 2 * b["counts"][..., None]).sum() / b["counts"].sum()


def convolved(p, b):
    numbers = ("NWC", "WIO", "NWC")
    h = lax.conv_general_dilated(b["series"], p["filter"], (1,), "SAME", dimension_numbers=numbers)
    pooled = lax.reduce_window(jax.nn.relu(h), -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID")
    return jnp.mean(pooled**2)


def own_gradient(p, b):
    @jax.custom_vjp
    def product(x, w):
        return jnp.tanh(x @ w)

    def backward(kept, g):
        return 0.5 * g @ kept[1].T, kept[0].T @ g / kept[0].shape[0]

    product.defvjp(lambda x, w: (product(x, w), (x, w)), backward)
    return jnp.mean(product(b["x"], p["inside"]) ** 2)


def own_accumulation(p, b):
    groups = b["x"].reshape(4, ROWS // 4, WIDTH)
    total, _ = lax.scan(lambda t, x: (t + jnp.mean(jnp.tanh(x @ p["inside"]) ** 2), None), 0.0, groups)
    return total / 4


def counted_loops(p, b):
    n = lax.fori_loop(0, 5, lambda _, a: 0.9 * a, lax.stop_gradient(p["scale"]))
    h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["state"]), hidden(p, b))
    return n * row(p, b).mean() + (h**2).mean()


def batch_norm(p, b):
    h = b["x"] @ p["inside"]
    h = (h - h.mean(0)) / jnp.sqrt((h**2).mean(0) - h.mean(0) ** 2 + 1e-5)
    return jnp.mean((jnp.tanh(h) @ p["head"]) ** 2), {"mean": h.mean(0)}


def batch_norm_twice(p, b):
    h = b["x"] @ p["inside"]
    for _ in range(2):
        h = jnp.tanh(h @ p["state"])
        h = (h - h.mean(0)) / (h.std(0) + 1e-5)
    return jnp.mean((h @ p["head"]) ** 2)


def layer_norm(p, b):
    h = hidden(p, b)
    h = (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)
    return jnp.mean((jax.nn.silu(h) @ p["head"]) ** 2)
