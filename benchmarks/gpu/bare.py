"""The reference on one GPU: a Llama of plain JAX, its layers scanned, attention by `jax.nn`, nothing else.

`python benchmarks/gpu/bare.py BATCH SEQUENCE none|dots|full [--small] [--trace DIR]` prints a JSON line:
seconds of a step of the shape of Llama-3.2-1B, without segments; `--small` is a shape for trying it out,
without cuDNN. `--trace DIR` keeps a profile of two more steps and the compiled program's text there.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from traced import traced

_ROUNDS, _STEPS, _WARM = 3, 10, 3
LARGE = {"L": 16, "E": 2048, "M": 8192, "H": 32, "K": 8, "D": 64, "V": 128_256}
SMALL = {"L": 2, "E": 64, "M": 128, "H": 4, "K": 2, "D": 16, "V": 512}


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch", type=int)
    parser.add_argument("sequence", type=int)
    parser.add_argument("remat", choices=("none", "dots", "full"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--trace", type=pathlib.Path)
    given = parser.parse_args()
    size = SMALL if given.small else LARGE
    step, params, moments, tokens = build(size, given.batch, given.sequence, given.remat, given.small)
    begun = time.perf_counter()
    lowered = step.lower(params, moments, tokens)
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - begun
    loss = jnp.float32(0)
    for _ in range(_WARM):
        params, moments, loss = compiled(params, moments, tokens)
    loss.block_until_ready()
    rounds = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        for _ in range(_STEPS):
            params, moments, loss = compiled(params, moments, tokens)
        loss.block_until_ready()
        rounds.append((time.perf_counter() - begun) / _STEPS)
    row = {
        "name": f"plain JAX, remat {given.remat}",
        "batch": given.batch,
        "sequence": given.sequence,
        "measured_step_seconds": statistics.median(rounds),
        "compile_seconds": compile_seconds,
        "loss": float(loss),
        "measured_peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    print(json.dumps(row), flush=True)
    if given.trace is not None:
        traced(lowered, (params, moments), (tokens,), given.trace, {})


def build(size, batch, sequence, remat, small):
    """Return the jitted step, parameters, moments and tokens."""
    L, E, M, H, K, D, V = (size[name] for name in "LEMHKDV")
    shapes = {
        "embed": (V, E), "q": (L, E, H, D), "k": (L, E, K, D), "v": (L, E, K, D), "o": (L, H, D, E),
        "gate": (L, E, M), "up": (L, E, M), "down": (L, M, E), "n1": (L, E), "n2": (L, E), "n3": (E,),
    }  # fmt: skip

    def init(key):
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {
            name: jnp.ones(shape) if name[0] == "n" else 0.02 * jax.random.normal(keys[name], shape)
            for name, shape in shapes.items()
        }

    def norm(x, gain):
        wide = x.astype(jnp.float32)
        scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-5)
        return scaled.astype(x.dtype) * gain.astype(x.dtype)

    def rotate(x):
        angles = jnp.arange(sequence)[:, None] / 500_000.0 ** (jnp.arange(D // 2) / (D // 2))
        cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        a, b = jnp.split(x.astype(jnp.float32), 2, -1)
        return jnp.concatenate([a * cosine - b * sine, a * sine + b * cosine], -1).astype(x.dtype)

    def layer(x, weights):
        w = {name: value.astype(jnp.bfloat16) for name, value in weights.items()}
        y = norm(x, w["n1"])
        q, k, v = (jnp.einsum("bse,ehd->bshd", y, w[name]) for name in "qkv")
        kernel = None if small else "cudnn"
        seen = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True, implementation=kernel)
        x = x + jnp.einsum("bqhd,hde->bqe", seen, w["o"])
        y = norm(x, w["n2"])
        return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"], None

    def loss(params, tokens):
        stacked = {name: value for name, value in params.items() if name not in ("embed", "n3")}
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = {
            "none": layer,
            "full": jax.checkpoint(layer),
            "dots": jax.checkpoint(layer, policy=dots),
        }[remat]
        x, _ = jax.lax.scan(body, params["embed"][tokens[:, :-1]].astype(jnp.bfloat16), stacked)
        x, head = norm(x, params["n3"]), params["embed"].astype(jnp.bfloat16)

        @jax.checkpoint
        def part(rows):
            logits = jnp.einsum("bse,ve->bsv", rows[0], head, preferred_element_type=jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, rows[1]).sum()

        parts = max(1, batch * sequence // 4096)
        rows = x.reshape(parts, 1, -1, E), tokens[:, 1:].reshape(parts, 1, -1)
        total, _ = jax.lax.scan(lambda sum_, one: (sum_ + part(one), None), 0.0, rows)
        return total / (batch * sequence)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, b2=0.95, weight_decay=0.1))

    def update(params, moments, tokens):
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        changes, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, changes), moments, value

    params = jax.jit(init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, V, (batch, sequence + 1), dtype=np.int32)
    step = jax.jit(update, donate_argnums=(0, 1))
    return step, params, jax.jit(optimizer.init)(params), jax.device_put(tokens)


if __name__ == "__main__":
    main()
