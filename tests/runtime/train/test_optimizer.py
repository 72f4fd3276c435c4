"""Learning rates at given steps, and what each optimiser does to matrices and vectors."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.runtime.config import OptimizerConfig, parse
from meshwright.runtime.train import optimizer
from meshwright.sharding import UserError

pytestmark = pytest.mark.numerics

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
NAMES = {"table": ("vocab", "embed"), "up": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}


def settings(**words: Any) -> OptimizerConfig:
    return parse({"optimizer": words}).optimizer


@jax.jit
def params() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"table": (6, 8), "up": (2, 8, 4), "bias": (2, 4)}
    return {name: draws.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def build(**words: Any) -> optax.GradientTransformation:
    config = settings(**words)
    return optimizer.build(config, optimizer.schedule(config, 10), NAMES)


def first_update(gradients: Any, **words: Any) -> Any:
    """What one step adds to the parameters."""
    transformation = build(**({"schedule": "constant", "learning_rate": 0.1, "clip_norm": None} | words))

    @jax.jit
    def update(gradients: Any, before: Any) -> Any:
        return transformation.update(gradients, transformation.init(before), before)[0]

    return update(gradients, params())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"schedule": "constant"}, {0: 1, 10: 1, 20: 1}),
        ({"schedule": "linear"}, {0: 1, 10: 0.55, 20: 0.1, 25: 0.1}),
        ({"schedule": "cosine"}, {0: 1, 10: 0.55, 20: 0.1, 25: 0.1}),
        ({"schedule": "cosine", "final_fraction": 0.0}, {5: (1 + np.cos(np.pi / 4)) / 2, 20: 0}),
        ({"schedule": "wsd"}, {0: 1, 16: 1, 18: 0.55, 20: 0.1}),
        ({"schedule": "wsd", "decay_steps": 10}, {10: 1, 15: 0.55, 20: 0.1}),
        ({"schedule": "constant", "warmup_steps": 4}, {0: 0, 1: 0.25, 4: 1, 20: 1}),
        ({"schedule": "linear", "warmup_steps": 4}, {2: 0.5, 4: 1, 12: 0.55, 20: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 4}, {2: 0.5, 4: 1, 12: 0.55, 20: 0.1}),
        ({"schedule": "wsd", "warmup_steps": 4}, {2: 0.5, 4: 1, 16: 1, 18: 0.55, 20: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 40}, {10: 0.25, 20: 0.5}),
    ],
)
def test_the_learning_rate_at_a_step(words: dict[str, Any], expected: dict[int, float]) -> None:
    rate = optimizer.schedule(settings(learning_rate=1.0, **words), 20)
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, abs=1e-6)


def test_a_fall_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"decay_steps=18 does not fit in train\.steps=20 .*; nearest: 16"):
        optimizer.schedule(settings(schedule="wsd", decay_steps=18, warmup_steps=4), 20)


@pytest.mark.parametrize(
    "words",
    [
        {"decay_steps": 3},
        {"schedule": "constant", "final_fraction": 0.5},
        {"name": "adafactor", "beta1": 0.8},
        {"name": "adafactor", "moment_dtype": "bfloat16"},
        {"name": "lion", "epsilon": 1e-6},
    ],
)
def test_a_setting_without_effect_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"optimizer: {list(words)[-1]}="):
        settings(**words)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimiser_learns(name: str) -> None:
    target = jax.tree.map(lambda leaf: leaf + 0.5, params())

    def loss(found: Any) -> jax.Array:
        return sum(jnp.sum(jnp.square(found[key] - target[key])) for key in target)  # pyright: ignore[reportReturnType]

    # Muon's steps in a matrix are a fifth of the learning rate, as AdamW's usually are.
    rate = 0.2 if name == "muon" else 0.05
    transformation = build(name=name, learning_rate=rate, schedule="constant", weight_decay=0.0)

    @jax.jit
    def step(found: Any, state: Any) -> Any:
        updates, state = transformation.update(jax.grad(loss)(found), state, found)
        return optax.apply_updates(found, updates), state

    found = params()
    state, before = transformation.init(found), loss(found)
    for _ in range(30):
        found, state = step(found, state)
    assert loss(found) < before / 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name: str) -> None:
    still = jax.tree.map(jnp.zeros_like, params())
    update = first_update(still, name=name, weight_decay=0.5)
    expected = params()
    # A learning rate of 0.1 times a decay of 0.5; the bias has one dimension besides its layers.
    np.testing.assert_allclose(update["table"], -0.05 * expected["table"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(update["up"], -0.05 * expected["up"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(update["bias"], 0, atol=1e-7)


def test_muon_moves_each_layers_matrix_in_all_directions_alike() -> None:
    gradients = jax.tree.map(lambda leaf: leaf * 3, params())
    update = first_update(gradients, name="muon", weight_decay=0.0)
    for layer in range(2):
        values = np.linalg.svd(np.asarray(update["up"][layer]), compute_uv=False)
        assert values.max() / values.min() < 2
        raw = np.linalg.svd(np.asarray(gradients["up"][layer]), compute_uv=False)
        assert raw.max() / raw.min() > 2.5
    # The embedding table is moved as by Adam, whose first step has one size and the gradient's signs.
    sizes = -update["table"] * jnp.sign(gradients["table"])
    np.testing.assert_allclose(sizes, sizes[0, 0], rtol=1e-3)
    assert sizes[0, 0] > 0


@pytest.mark.parametrize(("times", "kept"), [(0.1, 0.1), (10.0, 1.0)])
def test_gradients_are_clipped_by_their_common_norm(times: float, kept: float) -> None:
    gradients = params()
    norm = float(np.sqrt(sum(np.square(leaf).sum() for leaf in gradients.values())))
    transformation = build(name="adamw", clip_norm=norm * times, beta1=0.5, beta2=0.75)
    _, state = jax.jit(transformation.update)(gradients, transformation.init(gradients), gradients)
    # Adam's steps do not tell how long its gradients were; its moments do.
    first, second = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    for name, gradient in gradients.items():
        np.testing.assert_allclose(first[name], kept * gradient / 2, rtol=1e-5)
        np.testing.assert_allclose(second[name], jnp.square(kept * gradient) / 4, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_first_moments_are_stored_in_the_type_asked_for(name: str) -> None:
    state = jax.eval_shape(build(name=name, moment_dtype="bfloat16").init, params())
    kept = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert {leaf.shape for leaf in kept if leaf.dtype == jnp.bfloat16} == {(6, 8), (2, 8, 4), (2, 4)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_names_go_by_their_rank(name: str) -> None:
    matrices = {key: value for key, value in params().items() if key == "table"}
    named = optimizer.build(settings(name=name), lambda _: 0.1, {"table": ("embed", "mlp")})
    for names in (None, {}):
        unnamed = optimizer.build(settings(name=name), lambda _: 0.1, names)
        updates = [one.update(matrices, one.init(matrices), matrices)[0] for one in (named, unnamed)]
        np.testing.assert_allclose(*(update["table"] for update in updates))
