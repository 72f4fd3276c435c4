"""The decoder as a whole: arithmetic, packing, sharding, and what a planner reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshwright.models import Model, decoder, preset
from meshwright.models.transformer.attention import inverse_frequencies
from meshwright.sharding import UserError

pytestmark = pytest.mark.numerics

SMALL = {
    "layers": 2, "embed": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 32, "vocab": 40,
    "max_sequence": 32, "compute_dtype": "float32",
}  # fmt: skip
# A shape of each family, small, with windows that matter at a dozen tokens.
FAMILIES = {
    "llama3-8b": {},
    "llama3-405b": {"rope_original_sequence": 16},
    "qwen3-8b": {},
    "mistral-7b": {"window": 3},
    "gemma3-27b": {
        "window": 3,
        "layers": 4,
        "global_every": 2,
        "final_soft_cap": 5.0,
        "attention_soft_cap": 3.0,
    },
    "gpt-125m": {"kv_heads": 4},
}


def small(name: str, **changes: Any) -> Model:
    return decoder(preset(name, **(SMALL | FAMILIES[name] | changes)))


def packed(batch: int = 8, first: int = 5, second: int = 7, padding: int = 4) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    length = first + second + padding
    segments = np.repeat([1, 2, 0], [first, second, padding])
    targets = rng.integers(0, 40, (batch, length))
    targets[:, [first - 1, first + second - 1]] = -1
    rows = {
        "tokens": rng.integers(0, 40, (batch, length)),
        "targets": targets,
        "segment_ids": np.tile(segments, (batch, 1)),
        "positions": np.tile(np.concatenate([np.arange(n) for n in (first, second, padding)]), (batch, 1)),
    }
    return {name: jnp.asarray(value, jnp.int32) for name, value in rows.items()}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Jitted without the optimisations that take most of the time on shapes as small as these."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def made(model: Model) -> Any:
    """Parameters in which no bias is 0 and no scale is 1, so that each of them shows."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    values = []
    for path, leaf in flat:
        centre = 1.0 if path[-1].key == "scale" and not model.config.norm_offset else 0.0
        values.append(jnp.asarray(centre + 0.2 * rng.normal(size=leaf.shape), leaf.dtype))
    return jax.tree.unflatten(tree, values)


def reference_logits(model: Model, params: Any, tokens: np.ndarray) -> np.ndarray:
    """One row at a time, one head at a time, in NumPy float64."""
    c = model.config
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x: np.ndarray, p: dict[str, np.ndarray], rms: bool = False) -> np.ndarray:
        if c.norm == "layer" and not rms:
            x = x - x.mean(-1, keepdims=True)
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon) * p["scale"] + p["bias"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon) * (p["scale"] + c.norm_offset)

    def gelu(x: np.ndarray) -> np.ndarray:
        return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=True), np.float64)

    def turn(x: np.ndarray, local: bool) -> np.ndarray:
        if c.position_embedding == "learned":
            return x
        angles = np.arange(len(x))[:, None] * inverse_frequencies(c, local=local).astype(np.float64)
        half = c.head_dim // 2
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
        return np.concatenate((z.real, z.imag), -1)

    def cap(x: np.ndarray, limit: float | None) -> np.ndarray:
        return x if limit is None else limit * np.tanh(x / limit)

    def attention(x: np.ndarray, p: dict[str, Any], local: bool) -> np.ndarray:
        out = np.zeros((len(x), c.embed))
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        seen = (distance >= 0) & ((distance < c.window) if local and c.window else True)
        for h in range(c.heads):
            g = h // (c.heads // c.kv_heads)
            q, k, v = x @ p["query"][:, h], x @ p["key"][:, g], x @ p["value"][:, g]
            if c.bias != "none":
                q, k, v = q + p["query_bias"][h], k + p["key_bias"][g], v + p["value_bias"][g]
            if c.qk_norm:
                q, k = norm(q, p["query_norm"], rms=True), norm(k, p["key_norm"], rms=True)
            scores = turn(q, local) @ turn(k, local).T * (c.query_scale or c.head_dim**-0.5)
            scores = np.where(seen, cap(scores, c.attention_soft_cap), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out += weights / weights.sum(-1, keepdims=True) @ v @ p["output"][h]
        return out + p.get("output_bias", 0)

    def mlp(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
        up = x @ p["up"] + p.get("up_bias", 0)
        if c.activation == "gelu":
            return gelu(up) @ p["down"] + p["down_bias"]
        gate = x @ p["gate"]
        return ((gelu(gate) if c.activation == "geglu" else gate / (1 + np.exp(-gate))) * up) @ p["down"]

    rows = []
    for row in tokens:
        x = params["table"][row] * (c.embed**0.5 if c.scale_embeddings else 1)
        if c.position_embedding == "learned":
            x = x + params["positions"][: len(row)]
        for i in range(c.layers):
            p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
            local = c.global_every is None or (i + 1) % c.global_every != 0
            out = attention(norm(x, p["attention_norm"]), p["attention"], local)
            x = x + (norm(out, p["attention_post_norm"]) if c.post_norms else out)
            out = mlp(norm(x, p["mlp_norm"]), p["mlp"])
            x = x + (norm(out, p["mlp_post_norm"]) if c.post_norms else out)
        table = params["table"].T if c.tied_embeddings else params["unembed"]
        rows.append(cap(norm(x, params["final_norm"]) @ table, c.final_soft_cap))
    return np.stack(rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_published_arithmetic(name: str) -> None:
    model = small(name)
    params = made(model)
    tokens = np.asarray(packed(batch=2)["tokens"])
    wanted = reference_logits(model, params, tokens)
    np.testing.assert_allclose(compiled(model.logits)(params, jnp.asarray(tokens)), wanted, atol=2e-4)


@pytest.mark.parametrize("name", ["llama3-8b", "gemma3-27b", "gpt-125m"])
def test_documents_in_one_row_do_not_see_each_other(name: str) -> None:
    model = small(name)
    params = made(model)
    row = packed(batch=1)
    loss_of = compiled(model.loss)

    def part(start: int, stop: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss_of(params, {n: row[n][:, start:stop] for n in ("tokens", "targets")})

    parts = [part(0, 5), part(5, 12)]
    loss, aux = loss_of(params, row)
    weight = sum(a["weight"] for _, a in parts)
    assert aux["weight"] == weight == 10
    wanted = sum(value * a["weight"] for value, a in parts) / weight
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_padding_and_uncounted_targets_change_nothing() -> None:
    model = small("llama3-8b")
    params = made(model)
    batch = packed()
    other = batch | {"tokens": jnp.where(batch["segment_ids"] > 0, batch["tokens"], 3)}
    other["targets"] = jnp.where(batch["segment_ids"] > 0, batch["targets"], 5)
    loss = compiled(model.loss)
    assert loss(params, batch)[0] == loss(params, other)[0]


def test_chunking_changes_no_value() -> None:
    batch = packed()
    model, chunked = small("llama3-8b"), small("llama3-8b", attention_chunk=4, loss_chunk=2)
    params = made(model)
    one, two = (compiled(jax.value_and_grad(m.loss, has_aux=True))(params, batch) for m in (model, chunked))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, two)


def test_bfloat16_compute_keeps_float32_parameters_and_loss() -> None:
    model, exact = small("llama3-8b", compute_dtype="bfloat16"), small("llama3-8b")
    params = made(model)
    gradients = jax.eval_shape(jax.grad(model.loss, has_aux=True), params, packed())
    loss = compiled(model.loss)(params, packed())[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, gradients, loss))} == {"float32"}
    np.testing.assert_allclose(loss, compiled(exact.loss)(params, packed())[0], rtol=2e-2)
    half = jax.eval_shape(small("llama3-8b", param_dtype="bfloat16").init, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}


def shardings(model: Model, mesh: jax.sharding.Mesh, rules: dict[str, str]) -> Any:
    spec = lambda names: NamedSharding(mesh, P(*(rules.get(name) for name in names)))
    return jax.tree.map(spec, model.names, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("llama3-8b", (8, 1, 1), marks=pytest.mark.slow),
        pytest.param("llama3-8b", (2, 4, 1), marks=pytest.mark.slow),
        ("llama3-8b", (2, 2, 2)),
        ("gemma3-27b", (2, 2, 2)),
    ],
)
def test_sharded_loss_and_gradients_are_the_unsharded_ones(name: str, sizes: tuple[int, int, int]) -> None:
    model = small(name, loss_chunk=8)
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rules = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    params = made(model)
    batch = packed()
    step = compiled(jax.value_and_grad(model.loss, has_aux=True))
    wanted = step(params, batch)
    spread = jax.device_put(params, shardings(model, mesh, rules))
    rows = jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"))))
    got = step(spread, rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.asarray(b), atol=2e-5), wanted, got)


@pytest.mark.numerics(False)
@pytest.mark.devices(8)
def test_parameters_are_made_in_shards_with_the_same_values() -> None:
    model = small("llama3-8b", embed=64, mlp=256, vocab=1024)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    key = jax.random.key(0)
    make = jax.jit(model.init, out_shardings=shardings(model, mesh, {"embed": "fsdp"})).lower(key).compile()
    memory = make.memory_analysis()
    params = make(key)
    whole_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest_bytes = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert memory.output_size_in_bytes < whole_bytes / 7
    assert memory.temp_size_in_bytes < largest_bytes
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), b, atol=1e-6), params, jax.jit(model.init)(key)
    )


def test_names_are_parallel_to_parameters() -> None:
    for name in FAMILIES:
        model = small(name)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        leaf = lambda x: isinstance(x, tuple)
        assert jax.tree.structure(shapes) == jax.tree.structure(model.names, is_leaf=leaf)
        config = model.config
        sizes = {"layers": config.layers, "sequence": config.max_sequence}
        sizes |= {n: getattr(config, n) for n in ("embed", "heads", "kv_heads", "head_dim", "mlp", "vocab")}
        labelled = jax.tree.leaves(model.names, is_leaf=leaf)
        for array, names in zip(jax.tree.leaves(shapes), labelled, strict=True):
            assert array.shape == tuple(sizes[n] for n in names)
        assert model.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_a_planner_reads_one_scan_whatever_the_number_of_layers() -> None:
    def equations(layers: int) -> list[str]:
        model = small("llama3-8b", layers=layers)
        params = jax.eval_shape(model.init, jax.random.key(0))
        return [e.primitive.name for e in jax.make_jaxpr(model.loss)(params, packed()).eqns]

    assert equations(2) == equations(20)
    assert equations(2).count("scan") == 1


def test_mistakes_in_a_batch_are_named() -> None:
    model = small("gpt-125m")
    params = made(model)
    with pytest.raises(UserError, match="a batch needs 'targets'; it has 'tokens'"):
        model.loss(params, {"tokens": packed()["tokens"]})
    with pytest.raises(UserError, match="sequence=33 is longer than max_sequence=32"):
        model.logits(params, jnp.zeros((1, 33), jnp.int32))
    wrong = packed()
    assert jnp.isnan(compiled(model.loss)(params, wrong | {"tokens": wrong["tokens"] + 40})[0])
