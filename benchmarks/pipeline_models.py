"""Models as other people write them, for pipelines: each loss with its layers in a scan and in a Python loop.

A decoder of Flax modules with dropout, a vision transformer of closures, an encoder-decoder of plain trees,
a mixture after dense layers of dataclasses, a Linen decoder of packed documents. None marks anything for
stages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from meshwright.sharding import declare

LAYERS, WIDTH, HEADS, VOCAB, ROWS, TIME = 4, 32, 4, 64, 32, 16


class Case(NamedTuple):
    """A loss of (params, batch), and one of each."""

    loss: Callable[..., Any]
    params: Any
    batch: Any


def stacked(layers: list[Any]) -> Any:
    """Return one tree of arrays of all layers."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def tokens(vocabulary: int = VOCAB) -> Any:
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, ROWS, TIME)).astype(np.int32)
    return {"tokens": ids[0], "targets": ids[1]}


def normal(key: Any, *shape: int, by: float | None = None) -> Any:
    return jax.random.normal(key, shape) * (shape[0] ** -0.5 if by is None else by)


def rms(x: Any, scale: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def heads(x: Any) -> Any:
    return x.reshape(*x.shape[:-1], HEADS, -1)


def attend(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)
    return mixed.reshape(*mixed.shape[:2], -1)


def nnx_decoder(scanned: bool) -> Case:
    """Flax NNX blocks with dropout from a key that comes with the batch, a learned position, a tied table."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.before, self.after = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
            self.mix = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
            self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.up, self.down = (
                nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs),
                nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs),
            )

        def __call__(self, x: Any, key: Any) -> Any:
            q, k, v = map(heads, jnp.split(self.mix(self.before(x)), 3, axis=-1))
            x = x + self.out(attend(q, k, v, jnp.tril(jnp.ones((TIME, TIME), bool))))
            kept = jax.random.bernoulli(key, 0.9, x.shape)
            return x + jnp.where(kept, self.down(nnx.gelu(self.up(self.after(x)))) / 0.9, 0)

    class Decoder(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.table = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.position = nnx.Param(normal(rngs.params(), TIME, WIDTH, by=0.02))
            if scanned:
                self.blocks = nnx.vmap(Block, in_axes=0)(nnx.Rngs(0).fork(split=LAYERS))
            else:
                self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
            self.last = nnx.LayerNorm(WIDTH, rngs=rngs)

        def __call__(self, ids: Any, key: Any) -> Any:
            x = self.table(ids) + self.position[...]
            keys = jax.random.split(key, LAYERS)
            if scanned:
                graph, state = nnx.split(self.blocks)
                x = jax.lax.scan(
                    lambda x, own: (nnx.merge(graph, own[0])(x, own[1]), None), x, (state, keys)
                )[0]
            else:
                for block, own in zip(self.blocks, keys, strict=True):
                    x = block(x, own)
            return self.table.attend(self.last(x))

    graph, params = nnx.split(Decoder(nnx.Rngs(0)))

    def loss(params: Any, batch: Any) -> Any:
        logits = nnx.merge(graph, params)(batch["tokens"], batch["key"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    return Case(loss, params, tokens() | {"key": jax.random.key(7)})


def closures_vision(scanned: bool) -> Case:
    """Closures over names: a convolutional stem, a class token, squeeze-and-excite, weights per example."""
    keys = iter(jax.random.split(jax.random.key(0), 64))

    def linear(name: str, ins: int, outs: int) -> dict[str, Any]:
        return {f"{name}/w": normal(next(keys), ins, outs), f"{name}/b": jnp.zeros((outs,))}

    def dense(params: Any, name: str, x: Any) -> Any:
        return x @ params[f"{name}/w"] + params.get(f"{name}/b", 0)

    def block_of(params: Any, x: Any) -> Any:
        h = rms(x, params["norm/scale"])
        x = x + dense(params, "out", attend(*(heads(dense(params, n, h)) for n in "qkv")))
        gate = jax.nn.sigmoid(dense(params, "gate", x.mean(1, keepdims=True)))
        return x + gate * dense(params, "down", jax.nn.gelu(dense(params, "up", x)))

    layers = [
        {"norm/scale": jnp.ones((WIDTH,))}
        | {k: v for n in ("q", "k", "v", "out", "gate") for k, v in linear(n, WIDTH, WIDTH).items()}
        | linear("up", WIDTH, 2 * WIDTH)
        | linear("down", 2 * WIDTH, WIDTH)
        for _ in range(LAYERS)
    ]
    for own in layers:
        # Its gradient is nought, but for rounding.
        del own["k/b"]
    params = linear("head", WIDTH, 10) | {
        "stem/kernel": normal(next(keys), 4, 4, 3, WIDTH, by=0.1),
        "class": normal(next(keys), 1, 1, WIDTH, by=0.02),
        "position": normal(next(keys), 1, 17, WIDTH, by=0.02),
    }
    if scanned:
        params |= {f"blocks/{name}": leaf for name, leaf in stacked(layers).items()}
    else:
        params |= {f"block_{n}/{name}": leaf for n, own in enumerate(layers) for name, leaf in own.items()}

    def loss(params: Any, batch: Any) -> Any:
        x = jax.lax.conv_general_dilated(
            batch["image"],
            params["stem/kernel"],
            (4, 4),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x.reshape(x.shape[0], -1, WIDTH)
        first = jnp.broadcast_to(params["class"], (x.shape[0], 1, WIDTH))
        x = jnp.concatenate([first, x], 1) + params["position"]
        if scanned:
            own = {k.removeprefix("blocks/"): v for k, v in params.items() if k.startswith("blocks/")}
            x = jax.lax.scan(lambda x, layer: (block_of(layer, x), None), x, own)[0]
        else:
            for n in range(LAYERS):
                start = f"block_{n}/"
                x = block_of({k[len(start) :]: v for k, v in params.items() if k.startswith(start)}, x)
        logits = dense(params, "head", x[:, 0])
        losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(batch["label"], 0.1))
        right = (logits.argmax(-1) == batch["label"].argmax(-1)).mean()
        return (losses * batch["weight"]).sum() / batch["weight"].sum(), {"accuracy": right}

    draw = np.random.default_rng(0)
    rows = {
        "image": draw.normal(size=(ROWS, 16, 16, 3)).astype(np.float32),
        "label": np.eye(10, dtype=np.float32)[draw.integers(0, 10, ROWS)],
        "weight": (draw.random(ROWS) + 0.1).astype(np.float32),
    }
    return Case(loss, params, rows)


def encoder_decoder(scanned: bool) -> Case:
    """Plain trees: a short encoder, a longer decoder over it, padding masks, biases that all layers share."""
    keys = iter(jax.random.split(jax.random.key(0), 200))

    def attention() -> dict[str, Any]:
        return {name: normal(next(keys), WIDTH, WIDTH) for name in ("q", "k", "v", "o")}

    def layer(crosses: bool) -> dict[str, Any]:
        own = {"self": attention(), "wi": normal(next(keys), WIDTH, 64), "wo": normal(next(keys), 64, WIDTH)}
        own |= {"norms": jnp.ones((3, WIDTH))}
        return own | ({"cross": attention()} if crosses else {})

    def mix(own: Any, x: Any, to: Any, mask: Any, bias: Any = None) -> Any:
        q, k, v = heads(x @ own["q"]), heads(to @ own["k"]), heads(to @ own["v"])
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        scores = scores + (0 if bias is None else bias) + jnp.where(mask, 0.0, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return mixed.reshape(x.shape) @ own["o"]

    def work(own: Any, x: Any, mask: Any, bias: Any, to: Any = None, seen: Any = None) -> Any:
        h = rms(x, own["norms"][0])
        x = x + mix(own["self"], h, h, mask, bias)
        if to is not None:
            x = x + mix(own["cross"], rms(x, own["norms"][1]), to, seen)
        return x + jax.nn.relu(rms(x, own["norms"][2]) @ own["wi"]) @ own["wo"]

    def through(layers: Any, x: Any, *rest: Any) -> Any:
        if scanned:
            return jax.lax.scan(lambda x, own: (work(own, x, *rest), None), x, layers)[0]
        return functools.reduce(lambda x, own: work(own, x, *rest), layers, x)

    encoder, decoder = ([layer(one) for _ in range(count)] for one, count in ((False, 2), (True, LAYERS)))
    gathered = stacked if scanned else list
    params = {
        "shared": normal(next(keys), VOCAB, WIDTH, by=1.0),
        "bias": normal(next(keys), HEADS, TIME, TIME, by=0.1),
        "encoder": gathered(encoder),
        "decoder": gathered(decoder),
    }

    def loss(params: Any, batch: Any) -> Any:
        seen = (batch["source"] > 0)[:, None, None]
        source = through(params["encoder"], params["shared"][batch["source"]], seen, params["bias"])
        causal = jnp.tril(jnp.ones((TIME, TIME), bool))
        x = params["shared"][batch["tokens"]]
        x = through(params["decoder"], x, causal, params["bias"], source, seen)
        logits = x @ params["shared"].T / WIDTH**0.5
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        losses += 1e-4 * jnp.square(jax.nn.logsumexp(logits, -1))
        counted = batch["targets"] > 0
        return jnp.where(counted, losses, 0).sum() / counted.sum(), {"tokens": counted.sum()}

    source = np.random.default_rng(1).integers(0, VOCAB, (ROWS, TIME)).astype(np.int32)
    source[:, 0] = 1
    return Case(loss, params, tokens() | {"source": source})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Experts:
    """A mixture's router and matrices, one leading dimension of experts."""

    router: Any
    up: Any
    down: Any
    scale: Any

    @staticmethod
    def init(key: Any, count: int = 4) -> Experts:
        a, b, c = jax.random.split(key, 3)
        return Experts(
            normal(a, WIDTH, count),
            normal(b, count, WIDTH, WIDTH, by=0.2),
            normal(c, count, WIDTH, WIDTH, by=0.2),
            jnp.ones(WIDTH),
        )

    def __call__(self, x: Any) -> Any:
        h = rms(x, self.scale)
        shares = jax.nn.softmax(h @ self.router)
        best, chosen = jax.lax.top_k(shares, 2)
        sent = (jax.nn.one_hot(chosen, shares.shape[-1]) * best[..., None]).sum(-2)
        inner = jax.nn.silu(jnp.einsum("btd,edf->btef", h, self.up))
        given = jnp.einsum("btef,efd,bte->btd", inner, self.down, sent)
        busy = jax.nn.one_hot(chosen[..., 0], shares.shape[-1]).mean((0, 1))
        balance = shares.shape[-1] * (busy * shares.mean((0, 1))).sum()
        entropy = jnp.square(jax.nn.logsumexp(h @ self.router, -1)).mean()
        return x + given, balance, entropy, busy


def mixture(scanned: bool) -> Case:
    """Dataclasses: two dense layers, then a mixture in each, with losses of the whole batch's routing."""
    keys = jax.random.split(jax.random.key(0), 16)
    dense = [
        {"w": normal(k, WIDTH, WIDTH), "v": normal(k, WIDTH, WIDTH), "scale": jnp.ones(WIDTH)}
        for k in keys[:2]
    ]
    sparse = [Experts.init(key) for key in keys[2 : 2 + LAYERS]]
    params = {
        "table": normal(keys[-1], VOCAB, WIDTH, by=0.5),
        "head": normal(keys[-2], WIDTH, VOCAB),
        "dense": stacked(dense) if scanned else dense,
        "sparse": stacked(sparse) if scanned else sparse,
    }

    def first(x: Any, own: Any) -> Any:
        h = rms(x, own["scale"])
        return x + jnp.cumsum(jnp.tanh(h @ own["w"]), 1) / TIME @ own["v"]

    def loss(params: Any, batch: Any) -> Any:
        x = params["table"][batch["tokens"]]
        if scanned:
            x = jax.lax.scan(lambda x, own: (first(x, own), None), x, params["dense"])[0]

            def body(x: Any, own: Any) -> Any:
                x, *given = own(x)
                return x, given

            x, (balance, entropy, busy) = jax.lax.scan(body, x, params["sparse"])
            balance, entropy = balance.sum(), entropy.mean()
        else:
            balance, entropies, loads = 0.0, [], []
            for own in params["dense"]:
                x = first(x, own)
            for own in params["sparse"]:
                x, more, entropy, load = own(x)
                balance, entropies, loads = balance + more, [*entropies, entropy], [*loads, load]
            entropy, busy = sum(entropies) / LAYERS, jnp.stack(loads)
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], batch["targets"])
        return losses.mean() + 0.01 * balance + 1e-3 * entropy, {"busy": busy}

    return Case(loss, params, tokens())


def linen_packed(scanned: bool) -> Case:
    """Linen: packed documents with segments and rotary positions, untied head, half of each head rotated."""
    from flax import linen as nn

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, segments: Any, angles: Any) -> Any:
            h = nn.RMSNorm()(x)
            q, k, v = (heads(nn.Dense(WIDTH, use_bias=False, name=name)(h)) for name in "qkv")
            same = (segments[:, None, :, None] == segments[:, None, None]) & jnp.tril(
                jnp.ones((TIME, TIME), bool)
            )

            def turned(x: Any) -> Any:
                a, b, rest = x[..., :2], x[..., 2:4], x[..., 4:]
                sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
                return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], -1)

            x = x + nn.Dense(WIDTH, name="o")(attend(turned(q), turned(k), v, same))
            h = nn.RMSNorm()(x)
            x = x + nn.Dense(WIDTH, name="down")(nn.silu(nn.Dense(64, name="gate")(h)) * nn.Dense(64)(h))
            return x, None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, batch: Any) -> Any:
            x = nn.Embed(VOCAB, WIDTH)(batch["tokens"])
            angles = batch["positions"][..., None] / jnp.array([1.0, 10.0])
            if scanned:
                layers = nn.scan(
                    nn.remat(Layer),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    in_axes=nn.broadcast,
                    length=LAYERS,
                )
                x, _ = layers(name="layers")(x, batch["segments"], angles)
            else:
                for n in range(LAYERS):
                    x, _ = Layer(name=f"layer_{n}")(x, batch["segments"], angles)
            return nn.Dense(VOCAB, use_bias=False)(nn.RMSNorm()(x))

    rows = tokens()
    starts = np.random.default_rng(2).random((ROWS, TIME)) < 0.2
    rows["segments"] = np.cumsum(starts, 1).astype(np.int32)
    begun = np.maximum.accumulate(np.where(starts, np.arange(TIME), 0), 1)
    rows["positions"] = (np.arange(TIME) - begun).astype(np.int32)
    model = Model()
    params = model.init(jax.random.key(0), rows)

    def loss(params: Any, batch: Any) -> Any:
        logits = model.apply(params, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        counted = batch["segments"] > 0
        return (losses * counted).sum() / counted.sum()

    return Case(loss, params, rows)


MODELS: dict[str, Callable[[bool], Case]] = {
    "nnx_decoder": nnx_decoder,
    "closures_vision": closures_vision,
    "encoder_decoder": encoder_decoder,
    "mixture": mixture,
    "linen_packed": linen_packed,
}


def errors_of(name: str, scanned: bool, mesh: dict[str, int], **how: Any) -> tuple[float, float]:
    """Return the errors of a model's loss and auxiliaries, and of its worst gradient leaf."""
    function, params, rows = MODELS[name](scanned)
    count = int(np.prod(list(mesh.values())))
    made = declare(function, params, rows, topology=f"cpu:{count}", mesh=mesh, **how)
    devices = made.make_mesh(devices=jax.devices()[:count])
    where = made.shardings(params, devices), made.shardings(rows, devices, "batch")
    has_aux = isinstance(jax.eval_shape(function, params, rows), tuple)
    found = jax.jit(jax.value_and_grad(made.apply(function, mesh=devices), has_aux=has_aux))
    plain = jax.jit(jax.value_and_grad(function, has_aux=has_aux))(params, rows)
    return tuple(map(worst, found(*jax.device_put((params, rows), where)), plain))


def worst(found: Any, wanted: Any) -> float:
    """Return the largest relative error of the arrays of a tree."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0)) for a, b in wide)
