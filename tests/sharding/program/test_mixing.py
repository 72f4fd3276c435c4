"""Losses that mix examples, and losses that do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import zoo
from meshwright.sharding.errors import UserError
from meshwright.sharding.program import batch_mixing, batch_reduction, trace


@pytest.mark.parametrize("name", zoo.MODELS)
def test_models_of_the_zoo(name: str):
    case = zoo.MODELS[name]()
    assert bool(batch_mixing(trace(case.loss, *case.shapes()))) == case.mixes


def mixings(loss, *shape: int) -> list[str]:
    program = trace(loss, jnp.zeros((4, 4)), {"x": jnp.zeros((8, 4, *shape)), "w": jnp.zeros(8)})
    return [mixing.reason for mixing in batch_mixing(program)]


def test_a_weighted_mean_is_fine():
    def loss(p, b):
        rows = jnp.sum((b["x"] @ p) ** 2, axis=-1)
        return jnp.sum(rows * b["w"]) / jnp.maximum(jnp.sum(b["w"]), 1.0)

    assert mixings(loss) == []


def test_statistics_that_do_not_reach_the_loss_are_fine():
    def loss(p, b):
        y = b["x"] @ p
        return jnp.mean(y**2), {"std": jnp.std(y, axis=0), "sorted": jnp.sort(y, axis=0)}

    assert mixings(loss) == []


def test_batch_normalisation_names_its_line():
    case = zoo.resnet()
    first = batch_mixing(trace(case.loss, *case.shapes()))[0]
    assert "comes back" in first.reason
    assert "_batch_norm" in first.where
    assert not batch_mixing(trace((plain := zoo.resnet(batch_norm=False)).loss, *plain.shapes()))


def test_contrast_compares_all_with_all():
    case = zoo.contrastive()
    assert batch_mixing(trace(case.loss, *case.shapes()))

    def loss(p, b):
        y = b["x"] @ p
        return jnp.mean(jax.nn.relu(y @ y.T))

    assert any("every other" in reason for reason in mixings(loss))


def test_products_of_means_mix():
    def loss(p, b):
        share = jnp.mean(jax.nn.softmax(b["x"] @ p), axis=0)
        return jnp.sum(share * share)

    assert any("mul" in reason for reason in mixings(loss))


@pytest.mark.parametrize(
    ("mix", "word"),
    [
        (lambda y: jnp.sort(y, axis=0), "sort"),
        (lambda y: jnp.cumsum(y, axis=0), "cumsum"),
        (lambda y: y - jnp.roll(y, 1, axis=0), "past each other"),
        (lambda y: y[::-1] * y, "past each other"),
        (lambda y: y / jnp.max(y, axis=0), "reduce_max"),
        (lambda y: jax.lax.scan(lambda c, r: (c * 0.9 + r, c), y[0], y)[1], "one after another"),
        (lambda y: y[jnp.argsort(y[:, 0])], "argsort|sort"),
    ],
)
def test_rows_that_meet(mix, word):
    def loss(p, b):
        return jnp.mean(mix(b["x"] @ p) ** 2)

    reasons = mixings(loss)
    assert any(option in reason for reason in reasons for option in word.split("|")), reasons


def test_examples_may_be_mapped_one_by_one():
    def loss(p, b):
        return jnp.mean(jax.lax.map(lambda row: jnp.tanh(row @ p), b["x"]))

    assert mixings(loss) == []


def test_sequence_positions_of_a_decoder_do_meet():
    case = zoo.decoder()
    program = trace(case.loss, *case.shapes(), names={1: {"tokens": ("batch", "sequence")}})
    assert not batch_mixing(program, "batch")
    assert batch_mixing(program, "sequence")
    with pytest.raises(UserError, match="did you mean 'batch'"):
        batch_mixing(program, "bacth")


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda p, b: jnp.mean((b["x"] @ p) ** 2), "mean"),
        (lambda p, b: jnp.mean(jnp.sum((b["x"] @ p) ** 2, -1)) + 0.1 * jnp.sum(p), "mean"),
        (lambda p, b: jnp.sum((b["x"] @ p) ** 2) * (1 / 8), "mean"),
        (lambda p, b: jnp.sum((b["x"] @ p) ** 2), "sum"),
        (lambda p, b: jnp.mean(b["x"] @ p) + jnp.sum((b["x"] @ p) ** 2), "sum"),
        (lambda p, b: jnp.sum((b["x"] @ p).sum(-1) * b["w"]) / b["w"].sum(), "ratio"),
        (lambda p, b: jnp.sum(p), "none"),
    ],
)
def test_how_a_loss_comes_from_its_examples(loss, kind):
    program = trace(loss, jnp.zeros((4, 4)), {"x": jnp.zeros((8, 4)), "w": jnp.zeros(8)})
    assert batch_reduction(program) == kind
