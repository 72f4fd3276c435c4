"""A mixture of experts against a reference that takes one token at a time; latent attention with it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.models import decoder, preset
from meshwright.models.transformer.config import DecoderConfig
from meshwright.models.transformer.experts import Experts, capacity
from meshwright.sharding import UserError, plan
from meshwright.sharding.ops.experts import dispatch

pytestmark = pytest.mark.numerics

SMALL: dict[str, Any] = {
    "layers": 3,
    "embed": 32,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 8,
    "mlp": 48,
    "vocab": 64,
    "max_sequence": 16,
    "compute_dtype": "float32",
    "experts": 8,
    "experts_per_token": 2,
    "expert_mlp": 24,
}
LATENT = {"kv_rank": 16, "query_rank": 24, "rope_head_dim": 4, "value_head_dim": 6}


def small(**changes: Any) -> DecoderConfig:
    return DecoderConfig(**{**SMALL, **changes})


def made(config: DecoderConfig) -> Experts:
    from flax import nnx

    return Experts(config, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shared", [None, 2])
def test_every_token_gets_what_its_experts_give(router: str, shared: int | None) -> None:
    config = small(router=router, shared_experts=shared, router_scale=1.5)
    module = made(config)
    x = jax.random.normal(jax.random.key(1), (2, 16, config.embed))
    got = module(x)
    for row in range(2):
        for token in range(16):
            one = x[row, token]
            scores = one @ module.router[...]
            scores = jax.nn.sigmoid(scores) if router == "sigmoid" else jax.nn.softmax(scores)
            best = np.argsort(-np.asarray(scores))[:2]
            wanted = jnp.zeros(config.embed)
            for expert in best:
                hidden = jax.nn.silu(one @ module.gate[...][expert]) * (one @ module.up[...][expert])
                share = 1.5 * scores[expert] / scores[best].sum()
                wanted = wanted + share * (hidden @ module.down[...][expert])
            if shared:
                wanted = wanted + module.shared(one[None, None])[0, 0]
            np.testing.assert_allclose(got[row, token], wanted, rtol=2e-5, atol=2e-6)


def test_an_expert_takes_its_first_tokens_and_no_more() -> None:
    chosen = jnp.array([[0, 1], [0, 2], [0, 1], [3, 0]])
    tokens, places = dispatch(chosen, 4, 2)
    assert tokens.reshape(4, 2).tolist() == [[0, 1], [0, 2], [1, 4], [3, 4]]
    assert places.tolist() == [[0, 2], [1, 4], [8, 3], [6, 8]]
    assert capacity(small(expert_capacity=1.25), 16) == math.ceil(16 * 2 / 8 * 1.25)
    assert capacity(small(), 16) is None


def batch_of(config: DecoderConfig, rows: int = 8) -> dict[str, jax.Array]:
    tokens = jax.random.randint(jax.random.key(2), (rows, 16), 0, config.vocab)
    return {"tokens": tokens, "targets": jnp.roll(tokens, -1, axis=1)}


def test_a_mixture_with_dense_layers_learns() -> None:
    model = decoder(small(dense_layers=1, shared_experts=1, **LATENT))
    params, batch = model.init(jax.random.key(0)), batch_of(model.config)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        (loss, _), gradients = jax.value_and_grad(model.loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"dense_layers": 1, **LATENT}])
def test_it_decodes_what_it_scores(changes: dict[str, Any]) -> None:
    model = decoder(small(**changes))
    params, tokens = model.init(jax.random.key(0)), batch_of(model.config, 2)["tokens"]
    whole = model.logits(params, tokens)
    assert model.empty_cache is not None
    assert model.decode is not None
    cache = model.empty_cache(2, 16)
    for place in range(16):
        logits, cache = model.decode(params, cache, tokens[:, place], jnp.int32(place))
        np.testing.assert_allclose(logits, whole[:, place], rtol=2e-4, atol=2e-5)


MIXTRAL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "experts": 8}
QWEN: dict[str, Any] = {"qk_norm": True, "experts": 16, "experts_per_token": 4}
DEEPSEEK: dict[str, Any] = {"dense_layers": 1, "shared_experts": 1, "router": "sigmoid", **LATENT}


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        (DEEPSEEK, {"data": 2, "fsdp": 2, "tensor": 2}),
        (DEEPSEEK, {"fsdp": 2, "expert": 4}),
        (QWEN, {"data": 2, "expert": 2, "tensor": 2}),
        (MIXTRAL, {"data": 2, "expert": 4}),
    ],
)
def test_planned_it_keeps_its_values(changes: dict[str, Any], mesh: dict[str, int]) -> None:
    model = decoder(small(**changes))
    params, batch = model.init(jax.random.key(0)), batch_of(model.config)
    made = plan(
        model.loss,
        params,
        batch,
        topology="cpu:8",
        optimizer=optax.adam(1e-3),
        names=model.names,
        mesh=mesh,
    )
    devices = made.make_mesh()
    placed = jax.device_put(
        (params, batch), (made.shardings(params, devices), made.shardings(batch, devices, "batch"))
    )
    expected = jax.jit(jax.value_and_grad(model.loss, has_aux=True))(params, batch)
    got = jax.jit(jax.value_and_grad(made.apply(model.loss), has_aux=True))(*placed)
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(got[1]), strict=True):
        assert np.abs(np.asarray(other) - np.asarray(one)).max() <= 1e-5 * max(np.abs(one).max(), 1e-3)


def test_published_sizes() -> None:
    # 671B without multi-token prediction; the published total has the routers' 58 x 256 biases besides.
    deepseek = decoder(preset("deepseek-v3"))
    assert deepseek.num_parameters == 671_026_404_352
    # 37B are active, of which 0.9B are only looked up.
    assert 36e9 < deepseek.flops_per_token(1) / 6 < 37e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "experts_per_token=2 has no effect without experts"),
        ({"expert_mlp": None}, "experts=8 needs expert_mlp too"),
        ({"experts_per_token": 9}, "experts_per_token=9 is more than experts=8; nearest: 8"),
        ({"dense_layers": 3}, "dense_layers=3 leaves none of layers=3 to the experts; nearest: 2"),
        ({"router": "softmx"}, "did you mean 'softmax'"),
        ({"query_rank": 8}, "query_rank=8 has no effect without kv_rank"),
        ({"kv_rank": 8}, "kv_rank=8 needs rope_head_dim too"),
        ({**LATENT, "rope_head_dim": 3}, "rope_head_dim=3 is odd"),
        ({**LATENT, "kv_heads": 2}, "kv_heads=2 has no meaning in latent attention; write 4"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**changes)
