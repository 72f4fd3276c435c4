"""Chunked cross-entropy: the value and gradient of the plain one, in less memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshwright.models.transformer.loss import cross_entropy, logits_chunk
from meshwright.sharding import UserError

pytestmark = pytest.mark.numerics

BATCH, SEQUENCE, EMBED, VOCAB = 2, 12, 8, 24


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, VOCAB, (BATCH, SEQUENCE))
    targets[0, :4] = -1
    return (
        jnp.asarray(rng.normal(size=(BATCH, SEQUENCE, EMBED)), jnp.float32),
        jnp.asarray(rng.normal(size=(EMBED, VOCAB)), jnp.float32),
        jnp.asarray(targets, jnp.int32),
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [None, 1, 3, 6])
def test_chunks_give_the_plain_loss_and_its_gradients(chunk: int | None, z_loss: float) -> None:
    hidden, matrix, targets = inputs()

    def plain(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        logits = hidden @ matrix
        counted = targets >= 0
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        loss += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.sum(loss * counted) / counted.sum()

    def ours(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        return cross_entropy(hidden, lambda x: x @ matrix, targets, chunk=chunk, z_loss=z_loss)[0]

    wanted, got = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, matrix) for f in (plain, ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), wanted, got)


def test_auxiliaries_count_targets_and_right_answers() -> None:
    hidden, matrix, targets = inputs()
    best = jnp.argmax(hidden @ matrix, axis=-1)
    targets = targets.at[1].set(best[1])
    _, aux = cross_entropy(hidden, lambda x: x @ matrix, targets, chunk=4)
    assert aux["weight"] == 8 + SEQUENCE
    wanted = np.mean((best == targets)[targets >= 0])
    np.testing.assert_allclose(aux["accuracy"], wanted, rtol=1e-6)


def test_nothing_to_count_is_zero_not_nan() -> None:
    hidden, matrix, targets = inputs()

    def loss(hidden: jax.Array) -> jax.Array:
        return cross_entropy(hidden, lambda x: x @ matrix, jnp.full_like(targets, -1), chunk=3)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(hidden)
    assert value == 0
    assert not np.any(gradient)


@pytest.mark.numerics(False)
def test_logits_never_exist_at_once() -> None:
    batch, sequence, embed, vocab = 2, 256, 8, 4096
    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (((batch, sequence, embed), "f4"), ((embed, vocab), "f4"), ((batch, sequence), "i4"))
    ]

    def temporaries(chunk: int | None) -> int:
        def loss(hidden: jax.Array, matrix: jax.Array, targets: jax.Array) -> jax.Array:
            return cross_entropy(hidden, lambda x: x @ matrix, targets, chunk=chunk)[0]

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits_bytes = 4 * batch * sequence * vocab
    assert temporaries(None) >= all_logits_bytes
    assert temporaries(16) < all_logits_bytes / 4


def test_the_rule_follows_the_size_of_the_logits() -> None:
    assert logits_chunk(16, 256, 1024, None) is None
    assert logits_chunk(8, 8192, 128_256, None) == 512
    assert logits_chunk(1024, 4096, 1024, None) == 2048
    assert logits_chunk(8, 8192, 128_256, 1024) == 1024
    with pytest.raises(UserError, match="loss_chunk=5 does not divide sequence=12; nearest: 4 or 6"):
        logits_chunk(2, 12, 24, 5)
