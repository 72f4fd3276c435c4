"""Transformers: a decoder with grouped-query attention, an encoder–decoder, a vision transformer."""

from __future__ import annotations

import functools

import draws
import jax
import jax.numpy as jnp

from zoo.case import Case, Keys, cross_entropy, rms_norm


def _rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotate [batch, sequence, heads, head_dim] by position."""
    half = x.shape[-1] // 2
    angle = positions[..., None] / 10_000 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _decoder_layer(x: jax.Array, p: dict, positions: jax.Array) -> jax.Array:
    h = rms_norm(x, p["attention_norm"])
    q = jnp.einsum("bse,ehd->bshd", h, p["query"])
    k = jnp.einsum("bse,ehd->bshd", h, p["key"])
    v = jnp.einsum("bse,ehd->bshd", h, p["value"])
    out = jax.nn.dot_product_attention(_rope(q, positions), _rope(k, positions), v, is_causal=True)
    x = x + jnp.einsum("bshd,hde->bse", out, p["out"])
    h = rms_norm(x, p["mlp_norm"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def decoder(scale: int = 1, layers: int = 2) -> Case:
    """A Llama: scanned and rematerialised layers, grouped queries, rotary positions, a weighted mean."""
    embed, heads, kv_heads, head_dim, mlp, vocab = 32 * scale, 16, 8, 8 * scale, 48 * scale, 64
    batch, sequence = 8, 24

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "embedding": k.normal(vocab, embed, fan_in=1),
            "layers": {
                "attention_norm": jnp.ones((layers, embed)),
                "query": k.normal(layers, embed, heads, head_dim, fan_in=embed),
                "key": k.normal(layers, embed, kv_heads, head_dim, fan_in=embed),
                "value": k.normal(layers, embed, kv_heads, head_dim, fan_in=embed),
                "out": k.normal(layers, heads, head_dim, embed, fan_in=heads * head_dim),
                "mlp_norm": jnp.ones((layers, embed)),
                "gate": k.normal(layers, embed, mlp, fan_in=embed),
                "up": k.normal(layers, embed, mlp, fan_in=embed),
                "down": k.normal(layers, mlp, embed, fan_in=mlp),
            },
            "norm": jnp.ones(embed),
            "head": k.normal(embed, vocab),
        }

    def data(key: jax.Array) -> dict:
        tokens = jax.random.randint(key, (batch, sequence), 0, vocab)
        positions = jnp.broadcast_to(jnp.arange(sequence), (batch, sequence))
        return {
            "tokens": tokens,
            "targets": jnp.roll(tokens, -1, 1).at[:, -1].set(-1),
            "positions": positions,
        }

    def loss(params: dict, data: dict) -> jax.Array:
        x = params["embedding"][data["tokens"]]
        layer = jax.checkpoint(lambda x, p: (_decoder_layer(x, p, data["positions"]), None))
        x, _ = jax.lax.scan(layer, x, params["layers"])
        logits = rms_norm(x, params["norm"]) @ params["head"]
        counted = data["targets"] >= 0
        nll = cross_entropy(logits, jnp.where(counted, data["targets"], 0))
        return jnp.sum(nll * counted) / jnp.maximum(jnp.sum(counted), 1)

    return Case(loss=loss, init=init, data=data)


def _attend(p: dict, queries: jax.Array, memory: jax.Array, heads: int, *, causal: bool) -> jax.Array:
    """Attention with merged projections [embed, heads * head_dim], as many write it."""

    def split(x: jax.Array, w: jax.Array) -> jax.Array:
        return (x @ w).reshape(*x.shape[:-1], heads, -1)

    q, k, v = split(queries, p["q"]), split(memory, p["k"]), split(memory, p["v"])
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return out.reshape(*out.shape[:2], -1) @ p["o"]


def _attention_params(k: Keys, embed: int, inner: int) -> dict:
    return {**{name: k.normal(embed, inner) for name in "qkv"}, "o": k.normal(inner, embed)}


def _mlp_params(k: Keys, embed: int, mlp: int) -> dict:
    return {"up": k.normal(embed, mlp), "bias": jnp.zeros(mlp), "down": k.normal(mlp, embed)}


def _mlp(p: dict, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]


def encoder_decoder(scale: int = 1) -> Case:
    """A translator: two encoder and two decoder layers in plain loops, cross attention, tied embedding."""
    embed, heads, inner, mlp, vocab = 32 * scale, 8, 64 * scale, 96 * scale, 64
    batch, source, target = 8, 24, 16

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "embedding": k.normal(vocab, embed, fan_in=embed),
            "source_positions": k.normal(source, embed, fan_in=embed),
            "target_positions": k.normal(target, embed, fan_in=embed),
            "encoder": [
                {"attention": _attention_params(k, embed, inner), "mlp": _mlp_params(k, embed, mlp)}
                for _ in range(2)
            ],
            "decoder": [
                {
                    "attention": _attention_params(k, embed, inner),
                    "cross": _attention_params(k, embed, inner),
                    "mlp": _mlp_params(k, embed, mlp),
                }
                for _ in range(2)
            ],
        }

    def data(key: jax.Array) -> dict:
        a, b = jax.random.split(key)
        return {
            "source": jax.random.randint(a, (batch, source), 0, vocab),
            "target": jax.random.randint(b, (batch, target + 1), 0, vocab),
        }

    def loss(params: dict, data: dict) -> jax.Array:
        norm = functools.partial(jax.nn.standardize, axis=-1)
        x = params["embedding"][data["source"]] + params["source_positions"]
        for p in params["encoder"]:
            h = norm(x)
            x = x + _attend(p["attention"], h, h, heads, causal=False)
            x = x + _mlp(p["mlp"], norm(x))
        memory = norm(x)
        y = params["embedding"][data["target"][:, :-1]] + params["target_positions"]
        for p in params["decoder"]:
            h = norm(y)
            y = y + _attend(p["attention"], h, h, heads, causal=True)
            y = y + _attend(p["cross"], norm(y), memory, heads, causal=False)
            y = y + _mlp(p["mlp"], norm(y))
        logits = norm(y) @ params["embedding"].T
        return jnp.mean(cross_entropy(logits, data["target"][:, 1:]))

    return Case(loss=loss, init=init, data=data)


def vision_transformer(scale: int = 1) -> Case:
    """Patches by reshape, a class token, learned positions, two layers."""
    image, patch, channels, classes = 16, 4, 3, 16
    embed, heads, inner, mlp = 32 * scale, 8, 64 * scale, 96 * scale
    side = image // patch
    batch = 8

    def init(key: jax.Array) -> dict:
        k = Keys(key)
        return {
            "patches": k.normal(patch * patch * channels, embed),
            "class": k.normal(1, 1, embed, fan_in=embed),
            "positions": k.normal(side * side + 1, embed, fan_in=embed),
            "layers": [
                {"attention": _attention_params(k, embed, inner), "mlp": _mlp_params(k, embed, mlp)}
                for _ in range(2)
            ],
            "head": k.normal(embed, classes),
        }

    def data(key: jax.Array) -> dict:
        a, b = jax.random.split(key)
        return {
            "image": draws.normal(a, (batch, image, image, channels)),
            "label": jax.random.randint(b, (batch,), 0, classes),
        }

    def loss(params: dict, data: dict) -> jax.Array:
        norm = functools.partial(jax.nn.standardize, axis=-1)
        x = data["image"].reshape(batch, side, patch, side, patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * side, -1) @ params["patches"]
        first = jnp.broadcast_to(params["class"], (batch, 1, embed))
        x = jnp.concatenate([first, x], axis=1) + params["positions"]
        for p in params["layers"]:
            h = norm(x)
            x = x + _attend(p["attention"], h, h, heads, causal=False)
            x = x + _mlp(p["mlp"], norm(x))
        logits = norm(x[:, 0]) @ params["head"]
        return jnp.mean(cross_entropy(logits, data["label"]))

    return Case(loss=loss, init=init, data=data)
