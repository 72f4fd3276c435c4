"""The simplest models: a perceptron of nested dicts, and two encoders trained by contrast."""

from __future__ import annotations

import itertools

import draws
import jax
import jax.numpy as jnp

from zoo.case import Case, Keys


def mlp(scale: int = 1) -> Case:
    """Layers as nested dicts of weight [out, in] and bias [out], applied as ``w @ x`` under vmap."""
    sizes = (24, 64 * scale, 64 * scale, 8)

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "layers": [
                {"linear": {"weight": k.normal(b, a, fan_in=a), "bias": jnp.zeros(b)}}
                for a, b in itertools.pairwise(sizes)
            ]
        }

    def data(key: jax.Array) -> dict:
        a, b = jax.random.split(key)
        return {"x": draws.normal(a, (16, sizes[0])), "y": draws.normal(b, (16, sizes[-1]))}

    def apply(params: dict, x: jax.Array) -> jax.Array:
        *hidden, last = (layer["linear"] for layer in params["layers"])
        for p in hidden:
            x = jax.nn.relu(p["weight"] @ x + p["bias"])
        return last["weight"] @ x + last["bias"]

    def loss(params: dict, data: dict) -> jax.Array:
        out = jax.vmap(apply, in_axes=(None, 0))(params, data["x"])
        return jnp.mean((out - data["y"]) ** 2)

    return Case(loss=loss, init=init, data=data)


def contrastive(scale: int = 1) -> Case:
    """Images and texts of one batch are told apart from each other's: every example meets every other."""
    batch, features, embed = 16, 24, 32 * scale

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {"image": k.normal(features, embed), "text": k.normal(features, embed)}

    def data(key: jax.Array) -> dict:
        a, b = jax.random.split(key)
        return {
            "image": draws.normal(a, (batch, features)),
            "text": draws.normal(b, (batch, features)),
        }

    def loss(params: dict, data: dict) -> jax.Array:
        a = data["image"] @ params["image"]
        b = data["text"] @ params["text"]
        logits = a @ b.T
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))

    return Case(loss=loss, init=init, data=data, mixes=True)
