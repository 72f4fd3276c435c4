"""Layers in Python loops against scanned ones: `python benchmarks/unrolled.py [--only WORD] [--compile]`.

Each model is planned as people write it, its layers in a Python loop, and as its scanned twin. Printed are
the copies found, the seconds of tracing, of finding them and of planning, and the planned step of both. With
`--compile` a small one of each is compiled for `--target` as planned, as its twin and as written: peak memory
and seconds of the compiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from meshwright.sharding import Topology, UserError, plan
from meshwright.sharding.program.jaxpr import Traced, shapes_of
from meshwright.sharding.program.recognise import FORMS, recognised

HALF = jnp.bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of a model: `layers`, `width`, `hidden` of its MLP, `heads`, `kv_heads`, `vocabulary`."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int
    topology: str

    @property
    def head(self) -> int:
        """The width of a head."""
        return self.width // self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """A model: groups of layers in `params[group]`, a list of them, and what is around.

    `layers` is, for each group, the functions of a period: (parameters, stream, context) → stream. `start`
    gives the first stream and the context, `between` the stream and the context of the next group.
    """

    params: Any
    batch: Any
    layers: dict[str, Sequence[Callable[..., Any]]]
    start: Callable[[Any, Any], tuple[Any, Any]]
    finish: Callable[[Any, Any, Any], Any]
    between: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None

    def loss(self, params: Any, batch: Any) -> Any:
        """The layers in a Python loop."""
        return self._run(params, batch, self._loop)

    def twin(self, params: Any, batch: Any) -> Any:
        """The same, scanned, on parameters as `stacked` gives them."""
        return self._run(params, batch, self._scan)

    def _run(self, params: Any, batch: Any, run: Callable[..., Any]) -> Any:
        x, context = self.start(params, batch)
        for n, (group, period) in enumerate(self.layers.items()):
            if n and self.between is not None:
                x, context = self.between(params, batch, x)
            x = run(period, params[group], x, context)
        return self.finish(params, batch, x)

    @staticmethod
    def _loop(period: Any, layers: Any, x: Any, context: Any) -> Any:
        for n, p in enumerate(layers):
            x = period[n % len(period)](p, x, context)
        return x

    @staticmethod
    def _scan(period: Any, layers: Any, x: Any, context: Any) -> Any:
        def turn(x: Any, rows: Any) -> tuple[Any, None]:
            for layer, p in zip(period, rows, strict=True):
                x = layer(p, x, context)
            return x, None

        return jax.lax.scan(turn, x, layers)[0]

    def stacked(self) -> Any:
        """The twin's parameters."""
        params = dict(self.params)
        for group, period in self.layers.items():
            count = len(period)
            params[group] = [
                jax.tree.map(
                    lambda one, *rest: jax.ShapeDtypeStruct((1 + len(rest), *one.shape), one.dtype),
                    *params[group][n::count],
                )
                for n in range(count)
            ]
        return params


def _norm(x: Any, w: Any) -> Any:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6) * w).astype(x.dtype)


def _tokens(size: Size) -> Any:
    ids = jax.ShapeDtypeStruct((size.batch, size.length), jnp.int32)
    return {"tokens": ids, "targets": ids}


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _cross_entropy(logits: Any, targets: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()


def _around(size: Size) -> dict[str, Any]:
    return {"embed": _array(size.vocabulary, size.width), "norm": _array(size.width)}


def _start(params: Any, batch: Any) -> tuple[Any, Any]:
    return params["embed"].astype(HALF)[batch["tokens"]], None


def _finish(params: Any, batch: Any, x: Any) -> Any:
    return _cross_entropy(_norm(x, params["norm"]) @ params["embed"].astype(HALF).T, batch["targets"])


# The layers, each as its library's users write it.


def _plain_params(size: Size, *, cross: bool = False) -> Any:
    e, h, k, d, f = size.width, size.heads, size.kv_heads, size.head, size.hidden
    found = {"n1": _array(e), "q": _array(e, h, d), "k": _array(e, k, d), "v": _array(e, k, d)}
    found |= {"o": _array(h, d, e), "n2": _array(e), "gate": _array(e, f), "up": _array(e, f)}
    found |= {"down": _array(f, e)}
    if cross:
        found["cross"] = {"n": _array(e), "q": _array(e, h, d), "k": _array(e, k, d)}
        found["cross"] |= {"v": _array(e, k, d), "o": _array(h, d, e)}
    return found


def _attend(p: Any, x: Any, memory: Any = None, **how: Any) -> Any:
    p = {name: w.astype(HALF) for name, w in p.items() if name in ("q", "k", "v", "o")}
    memory = x if memory is None else memory
    q = jnp.einsum("bte,ehd->bthd", x, p["q"])
    k, v = (jnp.einsum("bse,ekd->bskd", memory, p[name]) for name in ("k", "v"))
    return jnp.einsum("bthd,hde->bte", jax.nn.dot_product_attention(q, k, v, **how), p["o"])


def _plain(**how: Any) -> Callable[..., Any]:
    def layer(p: Any, x: Any, context: Any) -> Any:
        x = x + _attend(p, _norm(x, p["n1"]), **how)
        if "cross" in p:
            x = x + _attend(p["cross"], _norm(x, p["cross"]["n"]), context)
        h = _norm(x, p["n2"])
        gate, up, down = (p[name].astype(HALF) for name in ("gate", "up", "down"))
        return x + (jax.nn.silu(h @ gate) * (h @ up)) @ down

    return layer


class NnxBlock(nnx.Module):
    """A block of a Llama in NNX."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        def linear(before: int, after: int) -> nnx.Linear:
            return nnx.Linear(before, after, use_bias=False, dtype=HALF, rngs=rngs)

        self.size = size
        self.n1, self.n2 = (nnx.RMSNorm(size.width, dtype=HALF, rngs=rngs) for _ in range(2))
        self.q = linear(size.width, size.width)
        self.k, self.v = (linear(size.width, size.kv_heads * size.head) for _ in range(2))
        self.o = linear(size.width, size.width)
        self.gate, self.up = (linear(size.width, size.hidden) for _ in range(2))
        self.down = linear(size.hidden, size.width)

    def __call__(self, x: Any) -> Any:
        """Return the stream after the block."""
        h, size = self.n1(x), self.size
        q, k, v = (
            one(h).reshape(*x.shape[:2], count, size.head)
            for one, count in ((self.q, size.heads), (self.k, size.kv_heads), (self.v, size.kv_heads))
        )
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.reshape(x.shape))
        h = self.n2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


def in_nnx(size: Size) -> Written:
    """A Llama whose blocks are NNX modules."""
    shapes = nnx.eval_shape(lambda: NnxBlock(size, nnx.Rngs(0)))
    graph, state = nnx.split(shapes)
    pure = nnx.to_pure_dict(state)

    def layer(p: Any, x: Any, context: Any) -> Any:
        del context
        block = nnx.merge(graph, nnx.State(nnx.restore_int_paths(p)))
        return block(x)

    params = _around(size) | {"layers": [pure for _ in range(size.layers)]}
    layers = {"layers": [layer]}
    return Written(params=params, batch=_tokens(size), layers=layers, start=_start, finish=_finish)


class LinenBlock(linen.Module):
    """A block of a GPT in Linen."""

    size: Size

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Return the stream after the block."""
        size = self.size
        h = linen.LayerNorm(dtype=HALF)(x)
        q, k, v = (linen.DenseGeneral((size.heads, size.head), dtype=HALF)(h) for _ in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + linen.DenseGeneral(size.width, axis=(-2, -1), dtype=HALF)(mixed)
        h = linen.Dense(size.hidden, dtype=HALF)(linen.LayerNorm(dtype=HALF)(x))
        return x + linen.Dense(size.width, dtype=HALF)(linen.gelu(h))


def in_linen(size: Size) -> Written:
    """A GPT whose blocks are Linen modules."""
    module = LinenBlock(size)
    stream = jax.ShapeDtypeStruct((1, size.length, size.width), HALF)
    one = jax.eval_shape(module.init, jax.random.key(0), stream)
    params = _around(size) | {"layers": [one for _ in range(size.layers)]}
    layers = {"layers": [lambda p, x, _: module.apply(p, x)]}
    return Written(params=params, batch=_tokens(size), layers=layers, start=_start, finish=_finish)


def in_functions(size: Size) -> Written:
    """A Llama of plain functions."""
    params = _around(size) | {"layers": [_plain_params(size) for _ in range(size.layers)]}
    layers = {"layers": [_plain(is_causal=True)]}
    return Written(params=params, batch=_tokens(size), layers=layers, start=_start, finish=_finish)


def alternating(size: Size) -> Written:
    """Five layers of a window, then one that sees all."""
    local, whole = _plain(is_causal=True, local_window_size=(1023, 0)), _plain(is_causal=True)
    params = _around(size) | {"layers": [_plain_params(size) for _ in range(size.layers)]}
    layers = {"layers": [local] * 5 + [whole]}
    return Written(params=params, batch=_tokens(size), layers=layers, start=_start, finish=_finish)


def vision(size: Size) -> Written:
    """A vision transformer."""
    batch = {
        "patches": jax.ShapeDtypeStruct((size.batch, size.length, 588), jnp.float32),
        "targets": jax.ShapeDtypeStruct((size.batch,), jnp.int32),
    }
    params = {"patch": _array(588, size.width), "norm": _array(size.width)}
    params |= {"head": _array(size.width, size.vocabulary), "places": _array(size.length, size.width)}
    params["layers"] = [_plain_params(size) for _ in range(size.layers)]

    def start(params: Any, batch: Any) -> tuple[Any, Any]:
        x = batch["patches"].astype(HALF) @ params["patch"].astype(HALF)
        return x + params["places"].astype(HALF), None

    def finish(params: Any, batch: Any, x: Any) -> Any:
        pooled = _norm(x.mean(1), params["norm"])
        return _cross_entropy(pooled @ params["head"].astype(HALF), batch["targets"])

    return Written(params=params, batch=batch, layers={"layers": [_plain()]}, start=start, finish=finish)


def encoder_decoder(size: Size) -> Written:
    """A T5: an encoder, and a decoder whose layers all read what it gives."""
    half = size.layers // 2
    params = _around(size) | {"encoder": [_plain_params(size) for _ in range(half)]}
    params["decoder"] = [_plain_params(size, cross=True) for _ in range(half)]

    def between(params: Any, batch: Any, x: Any) -> tuple[Any, Any]:
        return params["embed"].astype(HALF)[batch["targets"]], x

    return Written(
        params=params,
        batch=_tokens(size),
        layers={"encoder": [_plain()], "decoder": [_plain(is_causal=True)]},
        start=_start,
        finish=_finish,
        between=between,
    )


def state_space(size: Size) -> Written:
    """Blocks like Mamba's: a scan over time within each layer."""
    e, f, n = size.width, size.hidden, 16
    one = {"n": _array(e), "in": _array(e, 2 * f), "rate": _array(f, f // 16), "out": _array(f, e)}
    one |= {"rate_out": _array(f // 16, f), "b": _array(f, n), "c": _array(f, n), "a": _array(f, n)}

    def layer(p: Any, x: Any, context: Any) -> Any:
        del context
        cast = {name: w.astype(HALF) for name, w in p.items()}
        u, gate = jnp.split(_norm(x, p["n"]) @ cast["in"], 2, -1)
        rate = jax.nn.softplus((u @ cast["rate"]) @ cast["rate_out"]).astype(jnp.float32)
        b, c = u @ cast["b"], u @ cast["c"]

        def step(h: Any, now: Any) -> Any:
            u, rate, b, c = now
            h = jnp.exp(-rate[..., None] * jnp.exp(p["a"])) * h + (rate * u)[..., None] * b[:, None]
            return h, jnp.einsum("ben,bn->be", h, c.astype(jnp.float32))

        first = jnp.zeros((x.shape[0], f, n), jnp.float32)
        _, y = jax.lax.scan(step, first, jax.tree.map(lambda a: a.swapaxes(0, 1), (u, rate, b, c)))
        return x + (y.swapaxes(0, 1).astype(HALF) * jax.nn.silu(gate)) @ cast["out"]

    params = _around(size) | {"layers": [one for _ in range(size.layers)]}
    return Written(
        params=params, batch=_tokens(size), layers={"layers": [layer]}, start=_start, finish=_finish
    )


LLAMA = Size(
    layers=32, width=4096, hidden=14336, heads=32, kv_heads=8, vocabulary=128256, batch=512, length=8192,
    topology="v5p:4x4x8",
)  # fmt: skip
_small = {"batch": 256, "length": 1024, "topology": "v5e:4x8"}
GPT = Size(layers=24, width=2048, hidden=8192, heads=16, kv_heads=16, vocabulary=50304, **_small)
VIT = Size(
    layers=24, width=1024, hidden=4096, heads=16, kv_heads=16, vocabulary=1000, batch=4096, length=256,
    topology="v5e:4x8",
)  # fmt: skip
DEEP = dataclasses.replace(LLAMA, layers=126)

MODELS: dict[str, tuple[Callable[[Size], Written], Size]] = {
    "Llama 8B, NNX": (in_nnx, LLAMA),
    "Llama 8B, functions": (in_functions, LLAMA),
    "GPT, Linen": (in_linen, GPT),
    "ViT": (vision, VIT),
    "T5": (encoder_decoder, GPT),
    "5 local to 1 global": (alternating, GPT),
    "like Mamba": (state_space, dataclasses.replace(GPT, hidden=4096)),
    "126 layers": (in_functions, DEEP),
}


def planned(name: str, model: Written, size: Size) -> None:
    """Plan a model as written and as its twin, and print what came of it."""
    began = time.perf_counter()
    jaxpr, result = jax.make_jaxpr(model.loss, return_shape=True)(model.params, model.batch)
    traced = Traced(jaxpr=jaxpr, args=shapes_of((model.params, model.batch)), result=result)
    tracing = time.perf_counter() - began
    others = recognised(traced, ("attention", "losses"))
    began = time.perf_counter()
    found = recognised(others, ("layers",))
    finding = time.perf_counter() - began
    loops = [eqn.params["length"] for eqn in found.jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    rows = []
    for loss, params in ((model.loss, model.params), (model.twin, model.stacked())):
        began = time.perf_counter()
        try:
            made = plan(loss, params, model.batch, topology=size.topology, optimizer=optax.adamw(1e-3))
        except UserError as error:
            print(f"{name:22} {error}")
            return
        rows.append((made.estimate, time.perf_counter() - began))
    (ours, planning), (twin, of_twin) = rows
    print(
        f"{name:22} loops of {'+'.join(map(str, loops)) or '-':8} trace {tracing:5.2f} s  "
        f"find {finding:5.2f} s  plan {planning:5.2f} s (twin {of_twin:5.2f})  "
        f"step {ours.step_seconds:8.4f} s (twin {twin.step_seconds:8.4f}, "
        f"{ours.step_seconds / twin.step_seconds:5.3f})  MFU {ours.mfu:.1%}",
        flush=True,
    )


def compiled(name: str, model: Written, topology: str) -> None:
    """Compile the step of a model as planned, of its twin, and as written; print peaks and seconds."""
    rows = {
        "planned": (model.loss, model.params, FORMS, "full"),
        "twin": (model.twin, model.stacked(), FORMS, "full"),
        "written": (model.loss, model.params, (), "none"),
    }
    first = 0.0
    for word, (loss, params, forms, remat) in rows.items():
        made = plan(
            loss,
            params,
            model.batch,
            topology=topology,
            optimizer=optax.adamw(1e-3),
            mesh={"fsdp": Topology.parse(topology).num_devices},
            remat=remat,
            microbatches=1,
            recognise=forms,
        )
        began = time.perf_counter()
        proof = made.verify(use_cache=False).proof
        assert proof is not None
        peak, first = proof.peak_bytes, first or proof.peak_bytes
        print(
            f"{name:22} {topology:8} {word:8} peak {peak / 2**30:7.3f} GiB "
            f"(planned is {first / peak:5.3f} of it, estimate {made.estimate.peak_bytes / 2**30:7.3f})  "
            f"compiled in {proof.compile_seconds:6.1f} s, all {time.perf_counter() - began:6.1f} s",
            flush=True,
        )


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name has this word")
    parser.add_argument("--compile", action="store_true", help="compile small ones")
    parser.add_argument("--target", default="v5e:2x4", help="what they are compiled for")
    parser.add_argument("--layers", type=int, default=8, help="how many layers of them")
    words = parser.parse_args()
    for name, (make, size) in MODELS.items():
        if words.only.lower() not in name.lower():
            continue
        if words.compile:
            small = {"layers": words.layers, "vocabulary": 8192, "batch": 32, "length": 512}
            small |= {"width": 1024, "hidden": 4096, "heads": 8, "kv_heads": 8}
            compiled(name, make(dataclasses.replace(size, **small)), words.target)
        else:
            planned(name, make(size), size)


if __name__ == "__main__":
    main()
