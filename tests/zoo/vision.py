"""Convolutional models: a residual network with batch normalisation, a diffusion U-Net."""

from __future__ import annotations

import draws
import jax
import jax.numpy as jnp

from zoo.case import Case, Keys, cross_entropy


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolve [batch, height, width, channels] with [height, width, in, out], padded to the same size."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _batch_norm(x: jax.Array, p: dict) -> jax.Array:
    mean, variance = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * p["gain"] + p["bias"]


def _group_norm(x: jax.Array, p: dict, groups: int = 4) -> jax.Array:
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    mean = jnp.mean(grouped, (1, 2, 4), keepdims=True)
    variance = jnp.var(grouped, (1, 2, 4), keepdims=True)
    return ((grouped - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape) * p["gain"] + p["bias"]


def _norm_params(channels: int) -> dict:
    return {"gain": jnp.ones(channels), "bias": jnp.zeros(channels)}


def resnet(scale: int = 1, *, batch_norm: bool = True) -> Case:
    """Two stages of two residual blocks, the second at half the resolution and twice the channels."""
    image, width, classes, batch = 16, 16 * scale, 16, 8
    norm = _batch_norm if batch_norm else _group_norm

    def block(k: Keys, before: int, after: int) -> dict:
        p = {
            "conv1": k.normal(3, 3, before, after),
            "norm1": _norm_params(after),
            "conv2": k.normal(3, 3, after, after),
            "norm2": _norm_params(after),
        }
        return p if before == after else {**p, "skip": k.normal(1, 1, before, after)}

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "stem": k.normal(3, 3, 3, width),
            "blocks": [
                block(k, width, width),
                block(k, width, width),
                block(k, width, 2 * width),
                block(k, 2 * width, 2 * width),
            ],
            "head": k.normal(2 * width, classes),
        }

    def data(key: jax.Array) -> dict:
        a, b = jax.random.split(key)
        return {
            "image": draws.normal(a, (batch, image, image, 3)),
            "label": jax.random.randint(b, (batch,), 0, classes),
        }

    def loss(params: dict, data: dict) -> jax.Array:
        x = _conv(data["image"], params["stem"])
        for p in params["blocks"]:
            stride = 2 if "skip" in p else 1
            y = jax.nn.relu(norm(_conv(x, p["conv1"], stride), p["norm1"]))
            y = norm(_conv(y, p["conv2"]), p["norm2"])
            x = jax.nn.relu(y + (_conv(x, p["skip"], stride) if "skip" in p else x))
        logits = jnp.mean(x, (1, 2)) @ params["head"]
        return jnp.mean(cross_entropy(logits, data["label"]))

    return Case(loss=loss, init=init, data=data, mixes=batch_norm)


def unet(scale: int = 1) -> Case:
    """A denoiser: two resolutions, a skip joined by concatenation, time embedding, attention below."""
    image, width, batch = 8, 16 * scale, 8
    time_dim, heads = 32 * scale, 4

    def block(k: Keys, before: int, after: int) -> dict:
        return {
            "norm1": _norm_params(before),
            "conv1": k.normal(3, 3, before, after),
            "time": k.normal(time_dim, after),
            "norm2": _norm_params(after),
            "conv2": k.normal(3, 3, after, after),
            "skip": k.normal(1, 1, before, after),
        }

    def apply(p: dict, x: jax.Array, time: jax.Array) -> jax.Array:
        h = _conv(jax.nn.silu(_group_norm(x, p["norm1"])), p["conv1"])
        h = h + (jax.nn.silu(time) @ p["time"])[:, None, None, :]
        h = _conv(jax.nn.silu(_group_norm(h, p["norm2"])), p["conv2"])
        return h + _conv(x, p["skip"])

    def attend(p: dict, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        qkv = x.reshape(b, h * w, c) @ p["qkv"]
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, heads, -1), 2, 0)
        out = jax.nn.dot_product_attention(q, k, v)
        return x + (out.reshape(b, h * w, c) @ p["out"]).reshape(x.shape)

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "time1": k.normal(16, time_dim),
            "time2": k.normal(time_dim, time_dim),
            "stem": k.normal(3, 3, 4, width),
            "down": block(k, width, width),
            "shrink": k.normal(3, 3, width, 2 * width),
            "middle": block(k, 2 * width, 2 * width),
            "attention": {
                "qkv": k.normal(2 * width, 3 * 2 * width),
                "out": k.normal(2 * width, 2 * width),
            },
            "grow": k.normal(3, 3, 2 * width, width),
            "up": block(k, 2 * width, width),
            "end": k.normal(3, 3, width, 4),
        }

    def data(key: jax.Array) -> dict:
        a, b, c = jax.random.split(key, 3)
        return {
            "image": draws.normal(a, (batch, image, image, 4)),
            "noise": draws.normal(b, (batch, image, image, 4)),
            "time": jax.random.uniform(c, (batch,)),
        }

    def loss(params: dict, data: dict) -> jax.Array:
        frequencies = jnp.exp(jnp.arange(8.0))
        angle = data["time"][:, None] * frequencies
        time = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1) @ params["time1"]
        time = jax.nn.silu(time) @ params["time2"]
        signal = jnp.cos(data["time"])[:, None, None, None]
        noise = jnp.sin(data["time"])[:, None, None, None]
        x = _conv(signal * data["image"] + noise * data["noise"], params["stem"])
        x = skip = apply(params["down"], x, time)
        x = apply(params["middle"], _conv(x, params["shrink"], 2), time)
        x = attend(params["attention"], x)
        x = jax.image.resize(x, (batch, image, image, x.shape[-1]), "nearest")
        x = jnp.concatenate([_conv(x, params["grow"]), skip], axis=-1)
        x = _conv(apply(params["up"], x, time), params["end"])
        return jnp.mean((x - data["noise"]) ** 2)

    return Case(loss=loss, init=init, data=data)
