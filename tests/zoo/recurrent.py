"""Recurrent models: an LSTM by scan, a state-space model by associative scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from zoo.case import Case, Keys, cross_entropy, rms_norm


def lstm(scale: int = 1) -> Case:
    """One layer over time; the four gates come from one matmul and are split."""
    vocab, embed, hidden, batch, time = 64, 16 * scale, 32 * scale, 8, 12

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "embedding": k.normal(vocab, embed, fan_in=1),
            "input": k.normal(embed, 4 * hidden),
            "recurrent": k.normal(hidden, 4 * hidden),
            "bias": jnp.zeros(4 * hidden),
            "head": k.normal(hidden, vocab),
        }

    def data(key: jax.Array) -> dict:
        return {"tokens": jax.random.randint(key, (batch, time + 1), 0, vocab)}

    def loss(params: dict, data: dict) -> jax.Array:
        x = params["embedding"][data["tokens"][:, :-1]]

        def step(state: tuple, x: jax.Array) -> tuple:
            h, c = state
            gates = x @ params["input"] + h @ params["recurrent"] + params["bias"]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((batch, hidden))
        _, states = jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))
        logits = jnp.swapaxes(states, 0, 1) @ params["head"]
        return jnp.mean(cross_entropy(logits, data["tokens"][:, 1:]))

    return Case(loss=loss, init=init, data=data)


def state_space(scale: int = 1, layers: int = 2) -> Case:
    """Gated diagonal recurrences over time, computed by `associative_scan` in scanned layers."""
    vocab, embed, inner, state, batch, time = 64, 32 * scale, 64 * scale, 4, 8, 16

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "embedding": k.normal(vocab, embed, fan_in=1),
            "layers": {
                "norm": jnp.ones((layers, embed)),
                "in": k.normal(layers, embed, 2 * inner, fan_in=embed),
                "rate": k.normal(layers, inner, inner, fan_in=inner),
                "b": k.normal(layers, inner, state, fan_in=inner),
                "c": k.normal(layers, inner, state, fan_in=inner),
                "a": k.normal(layers, inner, state, fan_in=1),
                "out": k.normal(layers, inner, embed, fan_in=inner),
            },
            "head": k.normal(embed, vocab),
        }

    def data(key: jax.Array) -> dict:
        return {"tokens": jax.random.randint(key, (batch, time + 1), 0, vocab)}

    def layer(x: jax.Array, p: dict) -> tuple[jax.Array, None]:
        u, gate = jnp.split(rms_norm(x, p["norm"]) @ p["in"], 2, axis=-1)
        rate = jax.nn.softplus(u @ p["rate"])
        decay = jnp.exp(-rate[..., None] * jnp.exp(p["a"]))
        drive = (rate * u)[..., None] * (u @ p["b"])[:, :, None, :]

        def combine(left: tuple, right: tuple) -> tuple:
            return left[0] * right[0], left[1] * right[0] + right[1]

        _, states = jax.lax.associative_scan(combine, (decay, drive), axis=1)
        y = jnp.einsum("btns,bts->btn", states, u @ p["c"])
        return x + (y * jax.nn.silu(gate)) @ p["out"], None

    def loss(params: dict, data: dict) -> jax.Array:
        x = params["embedding"][data["tokens"][:, :-1]]
        x, _ = jax.lax.scan(layer, x, params["layers"])
        return jnp.mean(cross_entropy(x @ params["head"], data["tokens"][:, 1:]))

    return Case(loss=loss, init=init, data=data)
