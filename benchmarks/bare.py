"""The reference that meshwright is measured against: a Llama trained by plain JAX, and nothing else.

Prints one JSON line per run of steps: `python benchmarks/bare.py STEPS [--cache DIR]`.
"""

import json
import os
import sys
import time

began = time.perf_counter()
os.environ.setdefault("NPROC", "64")  # Or XLA's collectives can run out of threads and hang.
import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

EMBED, MLP, LAYERS, HEADS, SEQUENCE, BATCH, VOCAB = 256, 1024, 4, 8, 256, 16, 1024
HEAD = EMBED // HEADS
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
SHAPES = {
    "embed": (VOCAB, EMBED), "q": (LAYERS, EMBED, HEADS, HEAD), "k": (LAYERS, EMBED, HEADS, HEAD),
    "v": (LAYERS, EMBED, HEADS, HEAD), "o": (LAYERS, HEADS, HEAD, EMBED), "gate": (LAYERS, EMBED, MLP),
    "up": (LAYERS, EMBED, MLP), "down": (LAYERS, MLP, EMBED), "n1": (LAYERS, EMBED), "n2": (LAYERS, EMBED),
    "n3": (EMBED,), "out": (EMBED, VOCAB),
}  # fmt: skip


def sharding(leaf):
    split = leaf.shape.index(EMBED) if EMBED in leaf.shape else -1
    return NamedSharding(mesh, P(*("fsdp" if i == split else None for i in range(leaf.ndim))))


def init(key):
    keys = dict(zip(SHAPES, jax.random.split(key, len(SHAPES)), strict=True))
    return {
        n: jnp.ones(s) if n[0] == "n" else 0.02 * jax.random.normal(keys[n], s) for n, s in SHAPES.items()
    }


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def rope(x, positions):
    angles = positions[:, None] / 10000.0 ** (jnp.arange(HEAD // 2) / (HEAD // 2))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def layer(x, w):
    positions = jnp.arange(SEQUENCE)
    y = norm(x, w["n1"])
    q, k, v = (jnp.einsum("bse,ehd->bshd", y, w[n]) for n in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", rope(q, positions), rope(k, positions)) * HEAD**-0.5
    scores = jnp.where(positions[:, None] >= positions, scores, -1e30)
    x = x + jnp.einsum("bhqk,bkhd,hde->bqe", jax.nn.softmax(scores), v, w["o"])
    y = norm(x, w["n2"])
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"], None


def loss(params, batch):
    stacked = {n: p for n, p in params.items() if n not in ("embed", "n3", "out")}
    x = jax.lax.with_sharding_constraint(params["embed"][batch["tokens"]], NamedSharding(mesh, P("fsdp")))
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, stacked)
    logits = norm(x, params["n3"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.95, weight_decay=0.1))


def update(params, moments, batch):
    value, gradients = jax.value_and_grad(loss)(params, batch)
    changes, moments = optimizer.update(gradients, moments, params)
    return optax.apply_updates(params, changes), moments, value, optax.global_norm(gradients)


def trainer():
    """Return a function that trains for a number of steps and returns the last loss."""
    first_state = lambda key: (params := init(key), optimizer.init(params))
    shardings = jax.tree.map(sharding, jax.eval_shape(first_state, jax.random.key(0)))
    state = jax.jit(first_state, out_shardings=shardings)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (BATCH, SEQUENCE + 1), 0, VOCAB)
    batch = jax.device_put(
        {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, NamedSharding(mesh, P("fsdp"))
    )
    step = jax.jit(update, donate_argnums=(0, 1), out_shardings=(*shardings, None, None))

    def train(steps):
        nonlocal state
        value = jnp.nan
        for _ in range(steps):
            *state, value, _ = step(*state, batch)
        return float(value)

    return train


if __name__ == "__main__":
    if "--cache" in sys.argv:
        jax.config.update("jax_compilation_cache_dir", sys.argv[sys.argv.index("--cache") + 1])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    train = trainer()
    train(1)
    first = time.perf_counter() - began
    value = train(int(sys.argv[1])) if int(sys.argv[1]) else None
    print(json.dumps({"first_step_seconds": first, "loss": value}))
