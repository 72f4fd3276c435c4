"""Generation by cache says what the whole forward pass says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshwright.models import Model, decoder, generate, mlp, preset
from meshwright.sharding import UserError

pytestmark = pytest.mark.numerics

SHAPE = {"layers": 3, "embed": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 32, "vocab": 40}


def model_of(name: str) -> Model:
    changes = {
        "gemma3-27b": {"window": 3, "global_every": 2},
        "mistral-7b": {"window": 4},
        "gpt-125m": {"kv_heads": 4, "max_sequence": 16},
    }.get(name, {})
    return decoder(preset(name, **(SHAPE | {"compute_dtype": "float32"} | changes)))


def made(model: Model) -> Any:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(0.4 * rng.normal(size=a.shape), a.dtype), shapes)


@pytest.mark.parametrize("name", ["llama3-8b", "gemma3-27b", "mistral-7b", "gpt-125m"])
def test_greedy_tokens_are_the_likeliest_of_the_whole_row(name: str) -> None:
    model = model_of(name)
    params = made(model)
    prompt = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    out = generate(model, params, prompt, max_new_tokens=8, temperature=0)
    assert out.shape == (2, 12)
    assert np.array_equal(out[:, :4], prompt)
    likeliest = jnp.argmax(jax.jit(model.logits)(params, jnp.asarray(out)), axis=-1)
    assert np.array_equal(out[:, 4:], likeliest[:, 3:-1])


def test_samples_follow_key_temperature_and_top_k() -> None:
    model = model_of("llama3-8b")
    params = made(model)

    def sample(seed: int, **settings) -> np.ndarray:
        return generate(model, params, [1, 2, 3], max_new_tokens=12, key=jax.random.key(seed), **settings)

    assert np.array_equal(sample(0), sample(0))
    assert not np.array_equal(sample(0), sample(1))
    assert np.array_equal(sample(0, top_k=1), sample(1, temperature=0))
    out = sample(2, top_k=3)
    best = jax.lax.top_k(jax.jit(model.logits)(params, jnp.asarray(out)), 3)[1]
    assert all(out[0, i + 1] in best[0, i] for i in range(2, 14))


@pytest.mark.devices(8)
def test_sharded_parameters_give_the_same_tokens() -> None:
    model = model_of("llama3-8b")
    params = made(model)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    spec = lambda names: NamedSharding(mesh, P(*("fsdp" if n == "embed" else None for n in names)))
    sharded = jax.device_put(params, jax.tree.map(spec, model.names, is_leaf=lambda x: isinstance(x, tuple)))
    one, eight = (generate(model, p, [1, 2], max_new_tokens=6, temperature=0) for p in (params, sharded))
    assert np.array_equal(one, eight)


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([], {}, "at least one"),
        ([1.5], {}, "whole numbers"),
        ([1, 40], {}, "token 40; the model's vocabulary is 0 to 39"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_k": 41}, "top_k=41 must be from 1 to the vocabulary's 40"),
        ([1], {"max_new_tokens": 16}, "exceed max_sequence=16; at most 15 can be added"),
    ],
)
def test_what_cannot_work_is_refused(prompt: list, settings: dict, words: str) -> None:
    model = model_of("gpt-125m")
    with pytest.raises(UserError) as caught:
        generate(model, {}, prompt, **({"max_new_tokens": 2} | settings))
    assert words in str(caught.value)


def test_a_model_that_cannot_decode_says_so() -> None:
    with pytest.raises(UserError, match="no decode function"):
        generate(mlp(), {}, [1], max_new_tokens=1)
