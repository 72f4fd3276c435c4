"""A mixture of experts against a reference that takes one token at a time; latent attention with it."""

from __future__ import annotations

import functools
import math
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.models import decoder, preset
from meshwright.models.transformer.config import DecoderConfig
from meshwright.models.transformer.experts import Experts, capacity
from meshwright.models.transformer.router import choose, renewed, routing
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
    x = draws.normal(jax.random.key(1), (2, 16, config.embed))
    got, found = module(x)
    assert found is None
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


def test_choices_come_from_the_best_groups_by_the_bias_and_weigh_by_scores() -> None:
    """Against one token at a time: two of four groups of two experts, judged by both their experts."""
    config = small(router="sigmoid", router_groups=4, router_groups_per_token=2, router_bias_rate=0.1)
    scores = jax.nn.sigmoid(draws.normal(jax.random.key(0), (2, 5, 8)))
    bias = draws.normal(jax.random.key(1), (8,)) / 2
    weights, chosen = choose(config, scores, bias)
    for row, token in np.ndindex(2, 5):
        ranked = np.asarray(scores[row, token] + bias).reshape(4, 2)
        groups = np.argsort(-ranked.sum(1))[:2]
        among = [expert for expert in range(8) if expert // 2 in groups]
        best = sorted(among, key=lambda expert: -ranked.reshape(-1)[expert])[:2]
        assert chosen[row, token].tolist() == best
        own = np.asarray(scores[row, token])[best]
        np.testing.assert_allclose(weights[row, token], own / own.sum(), rtol=1e-6)


def test_a_rows_balance_loss_is_of_its_counted_tokens() -> None:
    scores = jax.nn.softmax(draws.normal(jax.random.key(0), (3, 6, 8)))
    chosen = jax.lax.top_k(scores, 2)[1]
    counted = jnp.array([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
    dropped = jnp.zeros(chosen.shape, bool).at[:, 0, 0].set(True)
    found = routing(scores, chosen, counted, dropped)
    for row, tokens in ((0, 6), (1, 4)):
        share = np.bincount(np.asarray(chosen[row, :tokens]).ravel(), minlength=8)
        assert found.load[row].tolist() == share.tolist()
        wanted = 8 * np.sum(share / (2 * tokens) * np.asarray(scores[row, :tokens]).mean(0))
        np.testing.assert_allclose(found.balance[row], wanted, rtol=1e-6)
        np.testing.assert_allclose(found.dropped[row], 1 / (2 * tokens))
    assert found.load[2].sum() == found.balance[2] == 0
    even = routing(jnp.full((1, 4, 8), 0.125), jnp.arange(8).reshape(1, 4, 2), None, None)
    np.testing.assert_allclose(even.balance, 1.0)


def test_a_bias_is_moved_against_the_load() -> None:
    config = small(router_bias_rate=0.5)
    moved = renewed(config, jnp.zeros((1, 4)), jnp.array([[8.0, 4.0, 4.0, 0.0]]))
    assert moved.tolist() == [[-0.5, 0.0, 0.0, 0.5]]


def test_a_capacity_tells_what_it_dropped() -> None:
    model = decoder(small(expert_capacity=0.25))
    _, aux = jax.jit(model.loss)(model.init(jax.random.key(0)), batch_of(model.config))
    # A quarter of the even share leaves at least three quarters of the choices without a place.
    assert 0.75 <= aux["dropped"] < 1.0
    assert aux["expert_load"] > 1.0


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
    params, batch = jax.jit(model.init)(jax.random.key(0)), batch_of(model.config)
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
    params, tokens = jax.jit(model.init)(jax.random.key(0)), batch_of(model.config, 2)["tokens"]
    whole = jax.jit(model.logits)(params, tokens)
    assert model.empty_cache is not None
    assert model.decode is not None
    cache, decode = model.empty_cache(2, 16), jax.jit(model.decode)
    for place in range(16):
        logits, cache = decode(params, cache, tokens[:, place], jnp.int32(place))
        np.testing.assert_allclose(logits, whole[:, place], rtol=2e-4, atol=2e-5)


# Published shapes, reduced: what makes each of them itself is left as it is.
REDUCED: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"kv_heads": 2},
    "qwen3-30b-a3b": {"kv_heads": 2, "experts": 16, "experts_per_token": 4},
    "deepseek-v3": {"dense_layers": 1, "router_groups": 4, "router_groups_per_token": 2, **LATENT},
}


def reduced(name: str, **changes: Any) -> DecoderConfig:
    return preset(name, **{**SMALL, **REDUCED[name], **changes})


@functools.cache
def plainly(name: str) -> tuple[Any, ...]:
    """What a reduced model begins with, a batch, and its plain loss and gradients: of all meshes the same."""
    model = decoder(reduced(name, balance_loss=0.1))
    first, batch = jax.jit(model.init)(jax.random.key(0)), batch_of(model.config)
    params, *state = first if model.has_state else (first,)
    found = jax.jit(jax.value_and_grad(model.loss, has_aux=True))(params, batch, *state)
    return model, params, state, batch, found


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("qwen3-30b-a3b", {"data": 2, "expert": 2, "tensor": 2}),
        ("deepseek-v3", {"fsdp": 2, "expert": 4}),
        ("deepseek-v3", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("mixtral-8x7b", {"expert": 4, "tensor": 2}),
    ],
)
def test_a_published_mixture_reduced_trains_as_on_one_device(name: str, mesh: dict[str, int]) -> None:
    """Loss, metrics and all that changes by a step in two parts, against the plain function on one device."""
    model, params, state, batch, ((value, rest), gradients) = plainly(name)
    optimizer = optax.sgd(0.1)
    beside: dict[str, Any] = {"state": state[0]} if state else {}
    declared: Any = {"names": model.names, "mesh": mesh, "microbatches": 2, "remat": "none"}
    made = plan(model.loss, params, batch, topology="cpu:8", optimizer=optimizer, **declared, **beside)
    step = made.train_step(model.loss, optimizer)
    got, metrics = step(made.init(model.init, jax.random.key(0), optimizer), batch)
    aux, *new = rest if state else (rest,)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["expert_load"], aux["expert_load"], rtol=1e-6)
    moved = jax.tree.map(lambda a, b: a - 0.1 * b, params, gradients)
    for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(got["params"]), strict=True):
        assert np.linalg.norm(np.asarray(other) - one) <= 1e-6 * np.linalg.norm(one)
    if state:
        bias = new[0]["router_bias"]
        assert np.abs(bias).max() == np.float32(1e-3)
        np.testing.assert_array_equal(got["state"]["router_bias"], bias)


def test_published_sizes() -> None:
    # 671B without multi-token prediction; the published total has the routers' 58 x 256 biases besides.
    deepseek = decoder(preset("deepseek-v3"))
    assert deepseek.num_parameters == 671_026_404_352
    assert jax.eval_shape(deepseek.init, jax.random.key(0))[1]["router_bias"].shape == (58, 256)
    # 37B are active, of which 0.9B are only looked up.
    assert 36e9 < deepseek.flops_per_token(1) / 6 < 37e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "experts_per_token=2 has no effect without experts"),
        ({"expert_mlp": None}, "experts=8 needs expert_mlp too"),
        ({"experts_per_token": 9}, "experts_per_token=9 is more than experts=8; nearest: 8"),
        ({"dense_layers": 3}, "dense_layers=3 leaves none of layers=3 to the experts; nearest: 2"),
        ({"router_groups": 3, "router_groups_per_token": 1}, "does not divide experts=8; nearest: 2 or 4"),
        ({"router_groups": 4}, "router_groups=4 needs router_groups and router_groups_per_token"),
        ({"router_groups": 8, "router_groups_per_token": 1}, "have 1 experts, fewer than .*nearest: 2"),
        (
            {"experts": None, "experts_per_token": None, "expert_mlp": None, "balance_loss": 0.1},
            "set experts",
        ),
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
